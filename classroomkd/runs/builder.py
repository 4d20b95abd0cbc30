"""Build a run's networks, from names or from modules given in Python."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from classroomkd import models
from classroomkd.errors import UserError, one_line
from classroomkd.models import factories
from classroomkd.models.initial_weights import start_from
from classroomkd.models.network_names import code_digest, is_code, label


@dataclass(frozen=True)
class Builder:
    """Builds and loads networks by architecture.

    An architecture is a name or a key of ``modules``; modules are copied.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    _codes: dict[str, str] = field(default_factory=dict)

    def create(
        self,
        architecture: str,
        num_classes: int,
        weights: str | None,
        notify: Callable[[str], None],
    ) -> tuple[nn.Module, str]:
        """A network to be trained, on the CPU, and a description of its initial weights.

        Raises UserError if it cannot be made or does not fit its first ``weights``.
        """
        if architecture in self.modules:
            return copy.deepcopy(self.modules[architecture]).cpu(), "starts with its given weights"
        if (code := self.code(architecture)) is not None:
            network = factories.build(architecture, num_classes, code)
        else:
            network = models.create(architecture, num_classes)
        if weights is None:
            return network, "starts from random weights"
        return network, start_from(network, architecture, weights, notify)

    def code(self, architecture: str) -> str | None:
        """The digest of the user code that builds a network, as of its first use."""
        if architecture in self.modules or not is_code(architecture):
            return None
        if architecture not in self._codes:
            self._codes[architecture] = code_digest(architecture)
        return self._codes[architecture]

    def source_digest(self, architecture: str, network: nn.Module) -> str | None:
        """The digest of all user code in ``network``, as far as it is known.

        None for a network of a library, which its version identifies.
        """
        if architecture not in self.modules:
            return self.code(architecture)
        kinds = {type(module) for module in network.modules()}
        own = [kind for kind in kinds if not kind.__module__.startswith("torch.nn.")]
        return hashlib.sha256("".join(sorted(map(_source, own))).encode()).hexdigest()

    def load(self, path: Path, architecture: str) -> nn.Module:
        """The network that the run has saved at ``path``."""
        if architecture not in self.modules:
            return models.load_network(path)[0]
        network = copy.deepcopy(self.modules[architecture]).cpu()
        network.load_state_dict(safetensors.torch.load_file(path))
        return network.eval()

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each given module's weights, by its name in error messages."""
        return {
            f"the module {name}": module_digest(module) for name, module in self.modules.items()
        }


def module_digest(module: nn.Module) -> str:
    """The SHA-256, in hexadecimal, of a network's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def outputs_of(network: nn.Module, images: Tensor, what: str) -> int:
    """The number of classes of ``network``, found by running it on ``images`` [B, …].

    Raises UserError, naming it ``what``, if it fails or does not return logits [B, C].
    """
    try:
        logits = network(images)
    except Exception as error:  # user code may raise anything
        if images.dim() != 4:
            raise UserError(
                f"{what} cannot take a batch {list(images.shape)} ({one_line(error)})"
            ) from None
        height, width = images.shape[-2:]
        raise UserError(
            f"{what} cannot take images of {height}×{width} pixels ({one_line(error)}): choose "
            "another --image-size"
        ) from None
    return _classes(logits, len(images), what)


def check_trainable(
    name: str, image_size: int, batch_size: int, num_classes: int | None = None
) -> None:
    """Raise UserError if there is no network ``name`` or it cannot train on such batches.

    The network is built and run on the meta device, without computing anything, or once on the CPU
    if user code does not support that.
    """
    try:
        outputs = _tried(name, image_size, batch_size, num_classes or 2, "meta")
    except UserError:
        if not is_code(name):
            raise
        with torch.random.fork_rng(devices=[]):
            outputs = _tried(name, image_size, batch_size, num_classes or 2, "cpu")
    if outputs != num_classes is not None:
        raise UserError(
            f"{label(name)} has {outputs} outputs for {num_classes} classes: let it "
            "take the number of classes as num_classes, or return that many logits"
        )


@torch.no_grad()
def _tried(name: str, image_size: int, batch_size: int, num_classes: int, device: str) -> int:
    with torch.device(device):
        network = models.create(name, num_classes)
        images = torch.zeros(min(batch_size, 2), 3, image_size, image_size)
    try:
        logits = network(images)
    except Exception as error:
        raise UserError(
            f"{label(name)} cannot train on images of {image_size}×{image_size} pixels in batches "
            f"of {batch_size} ({one_line(error)}): choose a larger --image-size or --batch-size"
        ) from None
    return _classes(logits, len(images), label(name))


def _classes(logits: object, rows: int, what: str) -> int:
    """C of logits [B, C]; UserError for anything else."""
    if not isinstance(logits, Tensor):
        raise UserError(f"{what} returns a {type(logits).__name__}, not logits [B, classes]")
    if logits.dim() != 2 or len(logits) != rows:
        raise UserError(
            f"{what} gives {list(logits.shape)} for {rows} images: its logits must be [B, classes]"
        )
    return logits.shape[1]


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # defined without a file, as in a notebook
        return f"{kind.__module__}.{kind.__qualname__}"
