"""The device and memory layout of a network."""

from __future__ import annotations

import torch
from torch import nn


def to_channels_last(network: nn.Module, device: torch.device) -> nn.Module:
    """Move ``network`` to ``device``, with channels-last weights, and return it."""
    # PyTorch's annotations lack this argument.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
