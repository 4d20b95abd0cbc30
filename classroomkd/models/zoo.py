"""The zoo: its networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from classroomkd.errors import UserError
from classroomkd.models import external, factories
from classroomkd.models.mobilenetv2 import MobileNetV2
from classroomkd.models.network_names import is_code, is_external, require_known
from classroomkd.models.resnet import ResNet
from classroomkd.models.resnet_four_stage import Bottleneck, FourStageBlock, ResNetFourStage
from classroomkd.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from classroomkd.models.vgg import VGG
from classroomkd.models.wrn import WideResNet

_WIDE = (32, 64, 128, 256)

ZOO: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, widths=_WIDE) for depth in (8, 32)},
    **{
        f"resnet{depth}_a": partial(ResNet, depth, projections=False)
        for depth in (20, 32, 44, 56, 110)
    },
    "resnet18": partial(ResNetFourStage, FourStageBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNetFourStage, FourStageBlock, (3, 4, 6, 3)),
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


def build(name: str, num_classes: int) -> nn.Module:
    """The network with default initialisation, to load weights into.

    Raises UserError if there is no network of this name.
    """
    if is_external(name):
        return external.build(name, num_classes)
    if is_code(name):
        return factories.build(name, num_classes)
    require_known(name)
    return ZOO[name](num_classes=num_classes)


def has_depthwise_convolutions(network: nn.Module) -> bool:
    """Whether ``network`` has a depthwise convolution."""
    return any(
        isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        for module in network.modules()
    )


def create(name: str, num_classes: int = 100, *, pretrained: bool = False) -> nn.Module:
    """A network of the zoo, ``tv:NAME`` of torchvision, ``timm:NAME`` of timm, or a user's own.

    Users' own are ``FILE.py:NAME`` or ``package.module:NAME`` (see `factories.build`).
    It maps [B, 3, H, W] to logits [B, num_classes]; the zoo's networks accept any H and W ≥ 8.
    Networks of the zoo have convolutions from He's normal distribution (fan-out) with zero biases,
    batch norms with scale 1 and shift 0, and PyTorch's default classifier. Other networks are
    initialised by their own code or, if ``pretrained``, have its default weights, in eval mode
    (`load_pretrained` also returns the normalisation of their images).

    Raises UserError if there is no network of this name, or no such weights for num_classes.
    """
    if pretrained:
        if not is_external(name):
            raise UserError(f"{name} has no pretrained weights: train it, or give a checkpoint")
        model, info = external.load_pretrained(name)
        if len(info.classes) != num_classes:
            raise UserError(
                f"the pretrained {name} has {len(info.classes)} classes, but {num_classes} are "
                "needed: train it on them, or give a checkpoint for them"
            )
        return model
    model = build(name, num_classes)
    if is_external(name) or is_code(name):
        return model
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
