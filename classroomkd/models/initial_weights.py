"""Initial weights from a checkpoint or a library, with a new classifier for other classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from classroomkd.errors import UserError
from classroomkd.models import external
from classroomkd.models.checkpoint import load_network
from classroomkd.models.info import NetworkInfo
from classroomkd.models.network_names import PRETRAINED, is_external, label
from classroomkd.models.states import summary


def load_given(
    architecture: str, weights: str, notify: Callable[[str], None]
) -> tuple[nn.Module, NetworkInfo | None]:
    """A network with the ``weights`` of a checkpoint, or "pretrained" for those of its library.

    Raises UserError if they are not that network's, or if there are none.
    """
    if weights == PRETRAINED:
        if not is_external(architecture):
            raise UserError(
                f"{label(architecture)} has no pretrained weights: give the file of a checkpoint"
            )
        return external.load_pretrained(architecture)
    network, info, _ = load_network(weights, architecture=architecture, notify=notify)
    return network, info


@torch.no_grad()
def start_from(
    network: nn.Module, architecture: str, weights: str, notify: Callable[[str], None]
) -> str:
    """Load ``weights`` into ``network``, except a classifier for another number of classes.

    Returns a description of what was loaded. Raises UserError as `load_given` does.
    """
    given = load_given(architecture, weights, notify)[0].state_dict()
    own = network.state_dict()
    new = [name for name, tensor in own.items() if given[name].shape != tensor.shape]
    for name, tensor in own.items():
        if name not in new:
            tensor.copy_(given[name])
    if not new:
        return f"starts from {weights}, its classifier included"
    return f"starts from {weights}, with a new classifier ({summary(new)})"
