"""The CIFAR model zoo, networks of torchvision and timm, and checkpoints of all of them."""

from .checkpoint import load_network, save_network, student_file
from .external import load_pretrained
from .info import NetworkInfo
from .registry import create, names

__all__ = [
    "NetworkInfo",
    "create",
    "load_network",
    "load_pretrained",
    "names",
    "save_network",
    "student_file",
]
