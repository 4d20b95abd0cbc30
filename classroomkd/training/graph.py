"""A training step, or a part of one, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3  # steps for libraries to select algorithms and the optimizer to allocate its buffers


class CapturedStep:
    """Calls ``step`` with tensors a few times, captures it, and replays it from then on.

    The step must not wait for the GPU, and must store its results in persistent tensors. What it
    returns is overwritten by the next call. All calls must have tensors of the same shapes.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] | None = None
        self._results: Any = None

    def __call__(self, *given: Tensor) -> Any:
        self._calls += 1
        if self._calls <= _WARM_UP:
            return self._warm_up(given)
        if self._graph is None:
            self._capture(given)
        assert self._graph is not None
        assert self._inputs is not None
        for static, now in zip(self._inputs, given, strict=True):
            static.copy_(now)
        self._graph.replay()
        return self._results

    def _warm_up(self, given: tuple[Tensor, ...]) -> Any:
        # Capturing autograd requires a warm-up on a side stream.
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            results = self._step(*given)
        current.wait_stream(side)
        return results

    def _capture(self, given: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(tensor.clone() for tensor in given)
        self._graph = torch.cuda.CUDAGraph()
        # This records without running. A loader's threads may use CUDA meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = self._step(*self._inputs)
