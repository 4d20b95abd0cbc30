"""Everything between files and batches: sources, augmentation and loaders.

Data flows one way: a source (``sources``, ``cifar``) returns two ``ImageSet``s, training and
held-out; a loader (``loader``) turns one into batches on a device. ``augmentation`` defines order
and augmentation once, for every loader, as a function of (seed, epoch, sample index). Networks and
training know nothing about files, and this package knows nothing about them.
"""

from typing import TYPE_CHECKING

from classroomkd.data.augmentation import Augmentation
from classroomkd.data.cache import cache_folder
from classroomkd.data.crops import CentreCrop, RandomResizedCrop
from classroomkd.data.image_sets import ImageFiles, ImageSet, from_dataset, join
from classroomkd.data.sources import (
    NAMED_SOURCES,
    Parts,
    decode,
    digits,
    is_split_by_seed,
    list_parts,
    list_source,
    load_parts,
    load_source,
    split_off,
)
from classroomkd.lazy import exports

if TYPE_CHECKING:
    from classroomkd.data.backends import BACKENDS, Loaders
    from classroomkd.data.ffcv.ffcv_loader import FFCVLoader
    from classroomkd.data.loader import Loader, channel_statistics
    from classroomkd.data.mixing import Mixing
    from classroomkd.data.resident import ResidentLoader
    from classroomkd.data.torch_loader import TorchLoader

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
    "Parts",
    "RandomResizedCrop",
    "ResidentLoader",
    "TorchLoader",
    "cache_folder",
    "channel_statistics",
    "decode",
    "digits",
    "from_dataset",
    "is_split_by_seed",
    "join",
    "list_parts",
    "list_source",
    "load_parts",
    "load_source",
    "split_off",
]
if not TYPE_CHECKING:  # with __getattr__, type checkers would accept any name
    __getattr__, __dir__ = exports(  # modules that import torch or FFCV
        __name__,
        {
            "backends": "BACKENDS Loaders",
            "ffcv.ffcv_loader": "FFCVLoader",
            "loader": "Loader channel_statistics",
            "mixing": "Mixing",
            "resident": "ResidentLoader",
            "torch_loader": "TorchLoader",
        },
    )
