"""Weights and inputs that depend on nothing but names, to compare implementations of a network."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

from classroomkd.models.zoo import build


def fill(model: nn.Module) -> nn.Module:
    """Overwrite the state dict: each tensor drawn from a generator seeded by its name's CRC-32."""
    for name, tensor in model.state_dict().items():
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        values = rng.standard_normal(tuple(tensor.shape))
        kind = name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            values = np.zeros(())
        elif kind == "running_var":
            values = 1.0 + 0.1 * np.abs(values)
        elif tensor.dim() > 1:
            values *= np.sqrt(2.0 / np.prod(tensor.shape[1:]))
        elif kind == "weight":
            values = 0.4 + 0.05 * values
        else:
            values *= 0.1
        tensor.copy_(torch.from_numpy(values))
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())


def without_weights(name: str) -> nn.Module:
    """A network of 100 classes on the meta device."""
    with torch.device("meta"):
        return build(name, 100)


def probe() -> Tensor:
    """The probe batch, float32 [2, 3, 32, 32]."""
    rng = np.random.Generator(np.random.PCG64(7))
    return torch.from_numpy(rng.standard_normal((2, 3, 32, 32))).float()
