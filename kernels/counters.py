"""The counters by which the programs of a launch find the last among them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class _Counters:
    """Counters in a device's memory by which a launch's programs find the last among them.

    Each is 0 before a launch and after. Launches that may overlap must not share one: each stream
    has its own, and so has each launch captured into a CUDA graph, which may be replayed on any
    stream, for good. Captured launches take theirs from a block that was zeroed before the capture
    began; were it zeroed in the graph, every replay would do it again. They are 16 bytes each, as
    Triton compiles anew for pointers that are not aligned to that.
    """

    _IN_A_BLOCK = 16_384

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_stream: dict[int, Tensor] = {}
        self._blocks: list[Tensor] = []  # all of them: graphs hold addresses in them
        self._taken = self._IN_A_BLOCK

    def take(self, stream: torch.cuda.Stream) -> Tensor:
        """A counter for a launch on the current stream."""
        if torch.cuda.is_current_stream_capturing():
            if self._taken == self._IN_A_BLOCK:
                return torch.zeros(4, dtype=torch.int32, device=self._device)
            return self._next()
        if self._taken > self._IN_A_BLOCK // 2:
            self._add_block()
        counter = self._of_stream.get(stream.cuda_stream)
        if counter is None:
            stream.wait_event(self._zeroed)
            counter = self._of_stream[stream.cuda_stream] = self._next()
        return counter

    def _next(self) -> Tensor:
        self._taken += 1
        return self._blocks[-1][4 * self._taken - 4 : 4 * self._taken]

    def _add_block(self) -> None:
        # torch.compile's CUDA graphs warm up with all of this thread's allocations in a pool of
        # theirs, where nothing may stay; another thread's go where they always do.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._allocate).result()
        self._taken = 0

    def _allocate(self) -> None:
        with torch.cuda.device(self._device):
            size = 4 * self._IN_A_BLOCK
            self._blocks.append(torch.zeros(size, dtype=torch.int32, device=self._device))
            self._zeroed = torch.cuda.Event()
            self._zeroed.record()


_counters: dict[torch.device, _Counters] = {}
_lock = threading.Lock()  # streams are per thread: several may ask at once


def counter(device: torch.device) -> Tensor:
    """A counter for a launch on the device's current stream."""
    if device.type != "cuda":  # the interpreter, or tensors that only describe a launch
        return torch.zeros(1, dtype=torch.int32, device=device)
    with _lock:
        if device not in _counters:
            _counters[device] = _Counters(device)
        return _counters[device].take(torch.cuda.current_stream(device))
