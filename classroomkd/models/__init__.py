"""Networks: the CIFAR zoo, those of torchvision and timm by name, and all of them on disk.

A file a family; ``registry`` knows them by name, ``external`` asks the other libraries, ``stages``
says where features are taken, ``checkpoint`` writes and loads weights: ``files`` reads them safely,
``states`` finds the state dicts in a file, ``recognition`` tells whose they are. How a network is
trained, or in what role, is not known here.
"""

from classroomkd.models.checkpoint import load_network, save_network, student_file
from classroomkd.models.external import is_external, load_pretrained
from classroomkd.models.files import SUFFIXES, split_entry
from classroomkd.models.info import NetworkInfo
from classroomkd.models.registry import create, has_depthwise_convolutions, names

__all__ = [
    "SUFFIXES",
    "NetworkInfo",
    "create",
    "has_depthwise_convolutions",
    "is_external",
    "load_network",
    "load_pretrained",
    "names",
    "save_network",
    "split_entry",
    "student_file",
]
