"""The features of the zoo's networks: the outputs of their stages, before global pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.models.mobilenetv2 import MobileNetV2
from classroomkd.models.resnet import ResNet
from classroomkd.models.resnet_four_stage import ResNetFourStage
from classroomkd.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from classroomkd.models.vgg import VGG
from classroomkd.models.wrn import WideResNet
from classroomkd.models.zoo import build

# As the literature on distillation counts them: the first block of a VGG or a MobileNetV2 belongs
# to the stem; of a MobileNetV2, the blocks before a change of resolution and the last one count.
_STAGES: dict[type[nn.Module], tuple[str, ...]] = {
    ResNet: ("layer1", "layer2", "layer3"),
    ResNetFourStage: ("layer1", "layer2", "layer3", "layer4"),
    WideResNet: ("block1", "block2", "block3"),
    VGG: ("block1", "block2", "block3", "block4"),
    MobileNetV2: ("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
    ShuffleNetV1: ("layer1", "layer2", "layer3"),
    ShuffleNetV2: ("layer1", "layer2", "layer3"),
}


def stages(network: nn.Module) -> list[nn.Module]:
    """The modules that end the stages of ``network``, or of the first network of the zoo in it.

    Their outputs [B, C_i, H_i, W_i] are those of a stage's last ReLU, except in pre-activation and
    inverted residual networks (WideResNet, MobileNetV2), whose stages end in a sum or a batch norm.

    Raises UserError if there is no network of the zoo.
    """
    for module in network.modules():
        if type(module) in _STAGES:
            return [module.get_submodule(name) for name in _STAGES[type(module)]]
    raise UserError(
        f"the stages of a {type(network).__name__} are not known: methods that compare features "
        "take networks of the zoo only"
    )


class StageOutputs:
    """Keeps the outputs of the stages of ``network`` when it is called, until they are taken.

    Outputs are kept unchanged, with their autograd graph if they have one. Hooks do not run in
    compiled code.

    Raises UserError as `stages` does.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = stages(network)
        self._features: list[Tensor | None] = [None] * len(modules)
        for i, module in enumerate(modules):
            module.register_forward_hook(self._keep(i))

    def _keep(self, i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._features[i] = output

        return hook

    def take(self) -> tuple[Tensor, ...]:
        """The last call's features [B, C_i, H_i, W_i], in order; they are no longer kept here.

        Raises RuntimeError if there was no call since they were last taken.
        """
        features, self._features = self._features, [None] * len(self._features)
        taken = tuple(tensor for tensor in features if tensor is not None)
        if len(taken) < len(features):
            raise RuntimeError("the network was not called since its features were last taken")
        return taken


@torch.no_grad()
def feature_shapes(name: str, image_size: int) -> list[tuple[int, int, int]]:
    """The shapes (C, H, W) of the features of a network for square images. Nothing is computed.

    Raises UserError as `stages` does.
    """
    with torch.device("meta"):
        network = build(name, 2).eval()
        features = StageOutputs(network)
        network(torch.empty(1, 3, image_size, image_size))
    return shapes_of(features.take())


def shapes_of(features: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """The shapes (C, H, W) of features [B, C, H, W]."""
    return [(channels, height, width) for _, channels, height, width in (f.shape for f in features)]
