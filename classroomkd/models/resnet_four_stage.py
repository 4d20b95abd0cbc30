"""The ImageNet residual networks adapted to CIFAR: four stages, a 3×3 stem and no max-pooling.

He, Zhang, Ren, Sun: *Deep Residual Learning for Image Recognition* (2015), table 1. The stride of a
bottleneck is in its 3×3 convolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FourStageBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut; the last is four times as wide."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.shortcut = _shortcut(in_channels, self.expansion * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class ResNetFourStage(nn.Module):
    """Stages of width 64, 128, 256 and 512; all but the first halve the resolution."""

    def __init__(
        self,
        block: type[FourStageBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__()
        out = block.expansion
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, blocks[0], 64, 64, stride=1)
        self.layer2 = _stage(block, blocks[1], 64 * out, 128, stride=2)
        self.layer3 = _stage(block, blocks[2], 128 * out, 256, stride=2)
        self.layer4 = _stage(block, blocks[3], 256 * out, 512, stride=2)
        self.linear = nn.Linear(512 * out, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


def _stage(
    block: type[FourStageBlock] | type[Bottleneck],
    blocks: int,
    in_channels: int,
    width: int,
    stride: int,
) -> nn.Sequential:
    rest = [block(width * block.expansion, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(in_channels, width, stride), *rest)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
    )
