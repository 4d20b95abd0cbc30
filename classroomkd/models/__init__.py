"""Networks: the CIFAR zoo, those of torchvision and timm, one's own, and all of them on disk.

Each family has a file. ``zoo`` builds networks by name, ``network_names`` lists the names without
importing torch, ``external`` asks the other libraries and ``factories`` one's own code, ``stages``
says where features are taken, ``layout`` moves a network to its device, and ``checkpoint`` writes
and loads weights, from which ``first_weights`` lets a training begin: ``weight_files`` reads them
safely, ``states`` finds the state dicts in a file, ``recognition`` finds their network. This
package knows nothing of training.
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
if not TYPE_CHECKING:  # checkers would take every name to be there
    __getattr__, __dir__ = exports(
        __name__,
        {
            "checkpoint": "load_network save_network student_file",
            "external": "load_pretrained",
            "zoo": "create",
        },
    )
