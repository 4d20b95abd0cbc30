"""The CIFAR model zoo, and checkpoints of its networks."""

from .checkpoint import NetworkInfo, load_network, save_network
from .registry import create, names

__all__ = ["NetworkInfo", "create", "load_network", "names", "save_network"]
