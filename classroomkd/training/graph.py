"""A training step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # steps for libraries to select algorithms and the optimizer to allocate its buffers


class CapturedStep:
    """Calls ``step(images, targets)`` a few times, captures it, and replays it from then on.

    The step must not wait for the GPU, and must store its results in persistent tensors. All
    batches must have the same shape.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], None]) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, images: Tensor, targets: Tensor) -> None:
        self._calls += 1
        if self._calls <= _WARM_UP:
            self._warm_up(images, targets)
            return
        if self._graph is None:
            self._capture(images, targets)
        assert self._graph is not None
        assert self._inputs is not None
        for static, given in zip(self._inputs, (images, targets), strict=True):
            static.copy_(given)
        self._graph.replay()

    def _warm_up(self, images: Tensor, targets: Tensor) -> None:
        # Capturing autograd requires a warm-up on a side stream.
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._step(images, targets)
        current.wait_stream(side)

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        self._inputs = images.clone(), targets.clone()
        self._graph = torch.cuda.CUDAGraph()
        # This records without running. A loader's threads may use CUDA meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._step(*self._inputs)
