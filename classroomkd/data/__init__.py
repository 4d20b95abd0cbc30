"""Data: sources decoded into memory, augmentation, and the loaders that feed the networks.

What belongs in this folder is everything between files and batches. Data flows one way: a source
(``sources``, ``cifar``) gives two ``ImageSet``s, training and held out; a loader (``loader``) turns
one into batches on a device, in the order and with the augmentation that ``augment`` defines once,
for every loader, as a function of (seed, epoch, sample index). Networks and training know nothing
of files, and this folder knows nothing of them.
"""

from classroomkd.data.augment import Augmentation
from classroomkd.data.loader import ResidentLoader, channel_statistics
from classroomkd.data.sources import ImageSet, digits, is_split_by_seed, join, load_source

__all__ = [
    "Augmentation",
    "ImageSet",
    "ResidentLoader",
    "channel_statistics",
    "digits",
    "is_split_by_seed",
    "join",
    "load_source",
]
