"""The device and the software that a run uses."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from classroomkd import __version__
from classroomkd.errors import UserError


def find_device(name: str | None) -> torch.device:
    """The device called ``name``; by default the GPU if there is one, else the CPU.

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
    """The dtype of activations for a recipe's ``precision`` on ``device``."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return getattr(torch, name)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for later allocations.

    By default glibc returns large blocks to the system, which then has to provide zeroed pages for
    every activation of every batch anew. Other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with suppress(OSError, TypeError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def device_name(device: torch.device) -> str:
    """The GPU's product name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    return {
        "classroomkd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def start(device: torch.device, processes: int) -> dict[str, Any]:
    """When, how and on which hardware this process was started: a line of a run's starts.jsonl."""
    found = versions()
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "device": device_name(device),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "versions": found,
    }


def command_line() -> str:
    """The command line of this process, quoted for a shell."""
    program, *arguments = sys.argv
    path = Path(program)
    is_module = path.name == "__main__.py"
    called = ["python", "-m", path.parent.name] if is_module else [path.name]
    return shlex.join([*called, *arguments])


def processor() -> str:
    """The CPU's product name, or its architecture if the system does not report one."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
