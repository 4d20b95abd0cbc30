"""A driver for Triton without a GPU: kernels are compiled for an H100 and passed to a function.

Tensors are on the CPU. The host does all of its work for a call except the launch itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from classroomkd.loss import fused

SHARED_BYTES = 227 * 1024


class StubDriver:
    """What Triton asks a driver for; ``launch`` gets what a launcher would."""

    def __init__(self, launch: Callable[..., object]) -> None:
        self.device = self.stream = 0
        self.launcher_cls = lambda source, metadata: launch
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES},
            # Module, function, registers, spills, most threads of a program.
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        """Its number."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Its handle."""
        return self.stream

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def stub_driver(launch: Callable[..., object]) -> Iterator[StubDriver]:
    """Within, the loss of a CPU's tensors is launched by that function."""
    with (
        mock.patch.object(driver, "_active", StubDriver(launch)) as active,
        mock.patch.object(fused, "_INTERPRET", True),
    ):
        yield active
