"""The zoo: every network by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from ..errors import UserError
from .mobilenetv2 import MobileNetV2
from .resnet import ResNet
from .resnet_four_stage import BasicBlock, Bottleneck, ResNetFourStage
from .shufflenet import ShuffleNetV1, ShuffleNetV2
from .vgg import VGG
from .wrn import WideResNet

_WIDE = (32, 64, 128, 256)

# Where the zoo's networks keep their classifier's bias, whose length is the class count.
CLASSIFIER_BIASES = ("fc.bias", "linear.bias", "classifier.bias", "classifier.0.bias")

ZOO: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, widths=_WIDE) for depth in (8, 32)},
    "resnet34": partial(ResNetFourStage, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNetFourStage, Bottleneck, (3, 4, 6, 3)),
    **{
        f"wrn_{depth}_{widen}": partial(WideResNet, depth, widen)
        for depth, widen in ((16, 1), (16, 2), (16, 8), (28, 10), (40, 1), (40, 2))
    },
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
}


def names() -> list[str]:
    """The names of all networks that `create` builds."""
    return list(ZOO)


def build(name: str, num_classes: int) -> nn.Module:
    """The network as PyTorch's layers initialise themselves; for loading weights into.

    Raises UserError if there is no network of this name.
    """
    if name not in ZOO:
        nearest = ", ".join(difflib.get_close_matches(name.lower(), ZOO, cutoff=0.0))
        raise UserError(f"no network is called {name!r}; the nearest names are {nearest}")
    return ZOO[name](num_classes=num_classes)


def create(name: str, num_classes: int = 100) -> nn.Module:
    """A network of the zoo, freshly initialised, mapping [B, 3, H, W] to logits [B, num_classes].

    Convolutions are drawn from He's normal distribution (fan-out) with zero biases, batch norms
    start at scale 1 and shift 0, the classifier as PyTorch's `Linear` does. H and W are at least 8.

    Raises UserError if there is no network of this name.
    """
    model = build(name, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
