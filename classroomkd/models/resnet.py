"""The CIFAR residual networks of three stages.

He, Zhang, Ren, Sun: *Deep Residual Learning for Image Recognition* (2015), section 4.2. Shortcuts
that change the shape are projections, as usual for distillation, also in the widened ``resnet8x4``
and ``resnet32x4``. In ``resnet20_a`` to ``resnet110_a`` they have no parameters (the paper's option
A), as in most published CIFAR-10 weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut, which has weights if ``projection`` is true."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, projection: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = (
                nn.Sequential(
                    nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                    nn.BatchNorm2d(channels),
                )
                if projection
                else PaddedShortcut(channels - in_channels, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class PaddedShortcut(nn.Module):
    """Every ``stride``-th pixel, between ``extra`` channels of zeros, half of them on each side."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.before, self.stride = extra // 2, stride
        self.after = extra - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class ResNet(nn.Module):
    """Three stages of ``(depth - 2) / 6`` basic blocks; the 2nd and 3rd halve the resolution."""

    def __init__(
        self,
        depth: int,
        num_classes: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        projections: bool = True,
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(blocks, widths[0], widths[1], 1, projections)
        self.layer2 = _stage(blocks, widths[1], widths[2], 2, projections)
        self.layer3 = _stage(blocks, widths[2], widths[3], 2, projections)
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _stage(
    blocks: int, in_channels: int, channels: int, stride: int, projection: bool
) -> nn.Sequential:
    rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, channels, stride, projection), *rest)
