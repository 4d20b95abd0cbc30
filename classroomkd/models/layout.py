"""The device, memory layout and input normalisation of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from classroomkd.models.info import NetworkInfo


def to_channels_last(network: nn.Module, device: torch.device) -> nn.Module:
    """Move ``network`` to ``device``, with channels-last weights, and return it."""
    # PyTorch's annotations lack this argument.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


class Renormalised(nn.Module):
    """Takes images normalised as ``data`` says to a network that wants them as ``own`` says.

    Maps images [B, 3, H, W] to logits [B, C].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, data: NetworkInfo, own: NetworkInfo) -> None:
        super().__init__()
        self.network = network
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1)
            for values in (data.mean, data.std, own.mean, own.std)
        )
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.network(torch.addcmul(self.shift, images, self.scale))


def bare(network: nn.Module) -> nn.Module:
    """The network without the wrapper that normalises its images."""
    return network.network if isinstance(network, Renormalised) else network
