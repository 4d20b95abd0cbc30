"""The features of networks: outputs of named layers, or of the zoo's stages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.models.layout import bare
from classroomkd.models.mobilenetv2 import MobileNetV2
from classroomkd.models.network_names import is_code
from classroomkd.models.resnet import ResNet
from classroomkd.models.resnet_four_stage import ResNetFourStage
from classroomkd.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from classroomkd.models.vgg import VGG
from classroomkd.models.wrn import WideResNet
from classroomkd.models.zoo import build

T = TypeVar("T")

# As usual for distillation, the first block of VGG and MobileNetV2 belongs to the stem. The stages
# of MobileNetV2 end before a change of resolution and at the last block.
_STAGES: dict[type[nn.Module], tuple[str, ...]] = {
    ResNet: ("layer1", "layer2", "layer3"),
    ResNetFourStage: ("layer1", "layer2", "layer3", "layer4"),
    WideResNet: ("block1", "block2", "block3"),
    VGG: ("block1", "block2", "block3", "block4"),
    MobileNetV2: ("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
    ShuffleNetV1: ("layer1", "layer2", "layer3"),
    ShuffleNetV2: ("layer1", "layer2", "layer3"),
}


def stages(network: nn.Module) -> list[str]:
    """The paths of the modules that end the stages of ``network``, or of one of the zoo in it.

    Their outputs [B, C_i, H_i, W_i] come after a ReLU, except for pre-activation and inverted
    residual networks (WideResNet, MobileNetV2), whose stages end in a sum or a batch norm.

    Raises UserError if there is no network of the zoo.
    """
    for path, module in network.named_modules():
        if type(module) in _STAGES:
            return [f"{path}.{name}" if path else name for name in _STAGES[type(module)]]
    raise UserError(
        f"the stages of a {type(network).__name__} are not known: name its layers, as "
        "student_layers or teacher_layers (classroomkd models NAME --features lists them)"
    )


class StageOutputs:
    """Captures the outputs of ``layers`` of ``network`` when it is called, until `take`.

    ``layers`` are module paths, as for `get_submodule`; by default the stages. Outputs keep their
    autograd graph; tokens [B, N, C] become [B, C, N, 1] and vectors [B, C] become [B, C, 1, 1].
    It works in code that is compiled afterwards, too.

    Raises UserError if there is no such module, or as `stages` does.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] = ()) -> None:
        network = bare(network)
        self._names = list(layers) or stages(network)
        self._features: list[Tensor | None] = [None] * len(self._names)
        for i, name in enumerate(self._names):
            _layer(network, name).register_forward_hook(self._keep(i))

    def _keep(self, i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._features[i] = output

        return hook

    def take(self) -> tuple[Tensor, ...]:
        """Return and release the features [B, C_i, H_i, W_i] of the last call, in order.

        Raises UserError if a layer was not called since they were last taken, or its output is no
        such feature.
        """
        features, self._features = self._features, [None] * len(self._features)
        return tuple(map(_as_map, features, self._names))


def _layer(network: nn.Module, name: str) -> nn.Module:
    known = dict(network.named_modules())
    if not name or name not in known:
        nearest = ", ".join(difflib.get_close_matches(name, filter(None, known), cutoff=0.0))
        raise UserError(
            f"a {type(network).__name__} has no layer {name!r}; the nearest are {nearest or 'none'}"
        )
    return known[name]


def _as_map(output: Tensor | None, name: str) -> Tensor:
    """An output as [B, C, H, W]."""
    if output is None:
        raise UserError(
            f"layer {name} was not called in the forward pass: name another, or leave out "
            "compile=true if it was compiled away"
        )
    if not isinstance(output, Tensor) or not 2 <= output.dim() <= 4:
        kind = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"layer {name} gives {kind}, and features are [B, C, H, W], [B, N, C] or [B, C]"
        )
    if output.dim() == 3:
        return output.transpose(1, 2)[..., None]
    return output if output.dim() == 4 else output[..., None, None]


@torch.no_grad()
def layer_shapes(name: str, image_size: int) -> dict[str, tuple[int, int, int]]:
    """The modules of a network that can be features, by path, with their shapes (C, H, W).

    They are those whose output for square images `StageOutputs` can keep. Nothing is computed,
    unless a user-defined network does not allow that.
    """
    shapes: dict[str, tuple[int, int, int]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            with suppress(UserError):
                shapes[path] = shapes_of([_as_map(cast(Tensor, output), path)])[0]

        return hook

    def prepare(network: nn.Module) -> None:
        for path, module in network.named_modules():
            if path:
                module.register_forward_hook(note(path))

    _called(name, image_size, prepare)
    return {path: shape for path, shape in shapes.items() if shape[0]}


@torch.no_grad()
def feature_shapes(
    name: str, image_size: int, layers: Sequence[str] = ()
) -> list[tuple[int, int, int]]:
    """The shapes (C, H, W) of the features of a network for square images, as of `StageOutputs`.

    Nothing is computed, unless a user-defined network does not allow that. Raises UserError as
    `StageOutputs` does.
    """
    return shapes_of(
        _called(name, image_size, lambda network: StageOutputs(network, layers)).take()
    )


def _called(
    name: str, image_size: int, prepare: Callable[[nn.Module], T], device: str = "meta"
) -> T:
    """Build a network, ``prepare`` it and call it, on the meta device if that works."""
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            network = build(name, 2).eval()
            prepared = prepare(network)
            network(torch.zeros(2, 3, image_size, image_size))
        return prepared
    except Exception:  # a user's network may need values
        if device == "cpu" or not is_code(name):
            raise
    return _called(name, image_size, prepare, "cpu")


def stage_names(name: str) -> list[str]:
    """The paths of the stages of a network; empty if they are not known."""
    with torch.device("meta"), suppress(UserError):
        return stages(build(name, 2))
    return []


def shapes_of(features: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """The shapes (C, H, W) of features [B, C, H, W]."""
    return [(channels, height, width) for _, channels, height, width in (f.shape for f in features)]
