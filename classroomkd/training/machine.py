"""The device and the software that a run stands on."""

from __future__ import annotations

import platform

import torch

from classroomkd import __version__
from classroomkd.errors import UserError


def find_device(name: str | None) -> torch.device:
    """The device called ``name``, by default the GPU if there is one, else the CPU.

    Raises UserError if it cannot be used.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda devices are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot use device {name!r}: {reason}: choose --device cpu") from None
    return device


def find_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations that a recipe's ``precision`` means on ``device``."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return getattr(torch, name)


def device_name(device: torch.device) -> str:
    """The GPU's product name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    return {
        "classroomkd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
