"""MobileNetV2 at half width, for CIFAR.

Sandler, Howard, Zhu, Zhmoginov, Chen: *MobileNetV2: Inverted Residuals and Linear Bottlenecks*
(2018), table 2, with ReLU instead of ReLU6, stride 1 in the second stage, and a first block that
keeps its 1×1 convolution although it does not expand.
"""

from __future__ import annotations

from torch import Tensor, nn

_STAGES = (  # expansion, channels at full width, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand by a 1×1, filter by a depthwise 3×3, project by a linear 1×1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_channels, hidden, 1),
            *_conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Seven stages of inverted residuals between a strided stem and a 1280-channel head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 16
        self.conv1 = _conv_bn_relu(3, channels, 3, stride=2)
        stages = []
        for expansion, full_width, blocks, stride in _STAGES:
            width = full_width // 2
            stage = [InvertedResidual(channels, width, stride, expansion)]
            stage += [InvertedResidual(width, width, 1, expansion) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            channels = width
        self.blocks = nn.Sequential(*stages)
        self.conv2 = _conv_bn_relu(channels, 1280, 1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(x.mean((2, 3)))


def _conv_bn_relu(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
