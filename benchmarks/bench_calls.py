"""What single calls take on a CPU, by pytest-benchmark: to compare before and after a change.

    pytest benchmarks/bench_calls.py --benchmark-autosave
    pytest benchmarks/bench_calls.py --benchmark-compare

The first saves its times, the second prints those of the last save beside its own. ``-k host``
selects a group:

- host: what the host does in a call on a GPU. The kernels are compiled for an H100, and each launch
  goes to a function that does nothing. All tensors are the CPU's, so that allocation and streams
  take other times than on a GPU.
- loss: the loss and its gradient on one CPU core, beside plain PyTorch.
- loader: an epoch of 2,048 images of 32×32 with crop and flip.

Comparisons of all sizes with other implementations, which the documentation shows, are the other
programs here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import loss_cpu
from baselines import composed_loss
from classroomkd import fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.data import Augmentation, ImageSet, Loader, ResidentLoader, TorchLoader
from loss import differentiated


class _Nothing(torch.autograd.Function):
    """What PyTorch itself takes for a loss with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, grad: tuple[Tensor]) -> Tensor:
        ctx.save_for_backward(*grad)
        return student.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return *ctx.saved_tensors, None


def _nothing(student: Tensor, *_: object, ranking: str) -> Tensor:
    return _Nothing.apply(student, (student.detach(),))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.benchmark(group="host")
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(fused_classroom_loss_and_grad, id="fused_classroom_loss_and_grad"),
        pytest.param(
            partial(fused_classroom_loss_and_grad, return_report=True),
            id="fused_classroom_loss_and_grad, report",
        ),
        pytest.param(differentiated(fused_classroom_loss, "sample"), id="fused_classroom_loss"),
        pytest.param(differentiated(_nothing, "sample"), id="a Function that does nothing"),
    ],
)
def test_host(benchmark: BenchmarkFixture, call: Callable[..., object]) -> None:
    """At the first size of ``loss_cpu.py``."""
    stub = pytest.importorskip("stub_driver", reason="needs Triton")
    batch = loss_cpu.inputs(loss_cpu.SIZES[0])
    with stub.stub_driver(lambda *_: None):
        call(*batch)  # compiles
        benchmark(call, *batch)


@pytest.mark.parametrize("size", loss_cpu.SIZES, ids=str)
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(fused_classroom_loss_and_grad, id="fused_classroom_loss_and_grad"),
        pytest.param(differentiated(composed_loss, "sample"), id="eager"),
    ],
)
def test_loss(
    benchmark: BenchmarkFixture, call: Callable[..., object], size: tuple[int, int, int]
) -> None:
    """(B, C, M)."""
    batch = loss_cpu.inputs(size)
    call(*batch)  # compiles
    benchmark.group = f"loss {size}"
    benchmark(call, *batch)


@pytest.mark.benchmark(group="loader")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(ResidentLoader, id="resident"),
        pytest.param(partial(TorchLoader, workers=0), id="torch"),
    ],
)
def test_loader(benchmark: BenchmarkFixture, kind: Callable[..., Loader]) -> None:
    """In this process, without workers."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8)
    image_set = ImageSet(images, rng.integers(0, 10, 2048), [str(name) for name in range(10)])
    augmentation = Augmentation(padding=4, flip=True)

    def epoch() -> int:
        return sum(len(targets) for _, targets, _ in loader)

    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "shuffle": True, "drop_last": False}
    with kind(image_set, 64, seed=0, augmentation=augmentation, **options) as loader:
        assert benchmark(epoch) == len(images)
