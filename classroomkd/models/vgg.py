"""VGG with batch normalisation, for CIFAR.

Simonyan, Zisserman: *Very Deep Convolutional Networks for Large-Scale Image Recognition* (2014).
For 32×32 images, max-pooling follows only the first three of the five blocks, and there is one
linear layer instead of three.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class VGG(nn.Module):
    """Five blocks of ``depths[i]`` 3×3 convolutions, 64, 128, 256, 512 and 512 channels wide."""

    def __init__(self, depths: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(depths[0], 3, 64)
        self.block1 = _block(depths[1], 64, 128)
        self.block2 = _block(depths[2], 128, 256)
        self.block3 = _block(depths[3], 256, 512)
        self.block4 = _block(depths[4], 512, 512)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(block(x), 2)
        x = self.block4(self.block3(x))
        return self.classifier(x.mean((2, 3)))


def _block(depth: int, in_channels: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [
            nn.Conv2d(channels if i else in_channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
