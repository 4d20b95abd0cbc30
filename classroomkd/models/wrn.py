"""Wide residual networks.

Zagoruyko, Komodakis: *Wide Residual Networks* (2016): pre-activation blocks, no dropout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreactivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3×3 convolutions.

    If the channels change, the shortcut's convolution also takes the activated input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    """Blocks of one width; the first may halve the resolution."""

    def __init__(self, blocks: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        rest = [PreactivationBlock(channels, channels, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(PreactivationBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of ``(depth - 4) / 6`` blocks, ``widen`` times as wide as 16, 32 and 64."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(blocks, 16, 16 * widen, stride=1)
        self.block2 = Stage(blocks, 16 * widen, 32 * widen, stride=2)
        self.block3 = Stage(blocks, 32 * widen, 64 * widen, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))
