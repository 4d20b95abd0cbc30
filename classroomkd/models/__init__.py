"""Networks: the CIFAR zoo, torchvision's, timm's and users' own by name, and weight files.

Each family of the zoo has a file. ``zoo`` builds networks by name, ``network_names`` lists them
without importing torch, ``external`` wraps torchvision and timm, ``factories`` runs users' own
code, ``stages`` extracts features, and ``layout`` moves a network to its device. ``checkpoint``
writes and loads weights, from which ``initial_weights`` starts a training: ``weight_files`` reads
files safely, ``states`` finds the state dicts in a file, and ``recognition`` identifies the
network. This package knows nothing about training.
"""

from typing import TYPE_CHECKING

from classroomkd.lazy import exports
from classroomkd.models.info import NetworkInfo
from classroomkd.models.network_names import is_external, names

if TYPE_CHECKING:
    from classroomkd.models.checkpoint import load_network, save_network, student_file
    from classroomkd.models.external import load_pretrained
    from classroomkd.models.zoo import create

__all__ = [
    "NetworkInfo",
    "create",
    "is_external",
    "load_network",
    "load_pretrained",
    "names",
    "save_network",
    "student_file",
]
if not TYPE_CHECKING:  # with __getattr__, type checkers would accept any name
    __getattr__, __dir__ = exports(
        __name__,
        {
            "checkpoint": "load_network save_network student_file",
            "external": "load_pretrained",
            "zoo": "create",
        },
    )
