"""Allocate the counters shared by the programs of a launch: the ``state`` of ``batch.py``."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

MAX_GROUPS = 64
"""Groups of programs that a state has counters for."""
_SIZE = 4 + MAX_GROUPS


class _States:
    """The states of launches in a device's memory: int64 numbers, 0 before and after each launch.

    Launches that may overlap must not share a state. Each stream has one, and so does each launch
    captured into a CUDA graph, permanently, because the graph may be replayed on any stream.
    Captured launches use a block that was zeroed before the capture; otherwise the graph would
    contain the zeroing, and every replay would repeat it.
    """

    _IN_A_BLOCK = 4096

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_stream: dict[int, Tensor] = {}
        self._blocks: list[Tensor] = []  # all are kept: graphs hold addresses in them
        self._taken = self._IN_A_BLOCK

    def take(self, stream: torch.cuda.Stream) -> Tensor:
        """A state for a launch on the current stream."""
        if torch.cuda.is_current_stream_capturing():
            if self._taken == self._IN_A_BLOCK:
                return torch.zeros(_SIZE, dtype=torch.int64, device=self._device)
            return self._next()
        if self._taken > self._IN_A_BLOCK // 2:
            self._add_block()
        state = self._of_stream.get(stream.cuda_stream)
        if state is None:
            stream.wait_event(self._zeroed)
            state = self._of_stream[stream.cuda_stream] = self._next()
        return state

    def _next(self) -> Tensor:
        self._taken += 1
        return self._blocks[-1][self._taken - 1]

    def _add_block(self) -> None:
        # torch.compile's CUDA graphs warm up with all of this thread's allocations in a pool of
        # theirs, where nothing may stay; another thread's go where they always do.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._allocate).result()
        self._taken = 0

    def _allocate(self) -> None:
        with torch.cuda.device(self._device):
            size = (self._IN_A_BLOCK, _SIZE)
            self._blocks.append(torch.zeros(size, dtype=torch.int64, device=self._device))
            self._zeroed = torch.cuda.Event()
            self._zeroed.record()


_states: dict[torch.device, _States] = {}
_lock = threading.Lock()  # streams are per thread: several may ask at once


def launch_state(device: torch.device) -> Tensor:
    """A state for a launch on the device's current stream."""
    if device.type != "cuda":  # the interpreter, or tensors that only describe a launch
        return torch.zeros(_SIZE, dtype=torch.int64, device=device)
    with _lock:
        if device not in _states:
            _states[device] = _States(device)
        return _states[device].take(torch.cuda.current_stream(device))
