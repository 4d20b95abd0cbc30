"""Where a network lies, and how."""

from __future__ import annotations

import torch
from torch import nn


def to_channels_last(network: nn.Module, device: torch.device) -> nn.Module:
    """Move ``network`` to ``device``, with its weights channels last, and return it."""
    # PyTorch's annotations leave this argument out.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
