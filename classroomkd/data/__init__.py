"""Data: sources decoded into memory, augmentation, and the loaders that feed the networks.

What belongs in this folder is everything between files and batches. Data flows one way: a source
(``sources``, ``cifar``) gives two ``ImageSet``s, training and held out; a loader (``loader``) turns
one into batches on a device, in the order and with the augmentation that ``augment`` defines once,
for every loader, as a function of (seed, epoch, sample index). Networks and training know nothing
of files, and this folder knows nothing of them.
"""

from typing import TYPE_CHECKING, Any

from classroomkd.data.augment import Augmentation
from classroomkd.data.backends import BACKENDS, Loaders, cache_folder
from classroomkd.data.crops import CentreCrop, RandomResizedCrop
from classroomkd.data.image_sets import ImageFiles, ImageSet, from_dataset, join
from classroomkd.data.loader import Loader, channel_statistics
from classroomkd.data.mixing import Mixing
from classroomkd.data.resident import ResidentLoader
from classroomkd.data.sources import (
    NAMED_SOURCES,
    digits,
    is_split_by_seed,
    list_source,
    load_source,
    split_off,
)
from classroomkd.data.torch_loader import TorchLoader

if TYPE_CHECKING:
    from classroomkd.data.ffcv_loader import FFCVLoader

__all__ = [
    "BACKENDS",
    "NAMED_SOURCES",
    "Augmentation",
    "CentreCrop",
    "FFCVLoader",
    "ImageFiles",
    "ImageSet",
    "Loader",
    "Loaders",
    "Mixing",
    "RandomResizedCrop",
    "ResidentLoader",
    "TorchLoader",
    "cache_folder",
    "channel_statistics",
    "digits",
    "from_dataset",
    "is_split_by_seed",
    "join",
    "list_source",
    "load_source",
    "split_off",
]


def __getattr__(name: str) -> Any:
    if name == "FFCVLoader":  # which asks for FFCV, and takes a while to import
        from classroomkd.data.ffcv_loader import FFCVLoader

        return FFCVLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
