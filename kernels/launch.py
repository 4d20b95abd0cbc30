"""Launching the kernels: block sizes, strides, outputs. Nothing here reads a value off the device.

Tensors come checked (``classroomkd/loss/options.py``) and are float32, float16 or bfloat16.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from classroomkd.kernels.classroom import classroom_kernel, confidence_kernel, scale_rows_kernel
from classroomkd.kernels.tiled import tiled_classroom_kernel
from classroomkd.kernels.tiled_scan import tiled_confidence_kernel

MAX_MENTORS = 16
MAX_CLASSES = 262_144
WARP_SIZE = 64 if torch.version.hip else 32
_MAX_THREADS = 256
# 32-bit values a thread may hold for logits and gradient; the kernels need up to 90 registers
# besides. Much for each thread means few threads a row, and so few instructions: what is done once
# a row (divisions, logarithms, reductions) every thread does.
_MAX_VALUES_PER_THREAD = 144
# Up to here every program counts the valid rows itself, which hides behind its logits' way from
# memory; beyond, its reading all targets would cost more than one more launch.
_MAX_ROWS_COUNTED_IN_PASS = 1024


class Blocks(NamedTuple):
    """How a kernel's work is cut up: ROWS rows of BLOCK_C columns for num_warps warps."""

    BLOCK_C: int
    ROWS: int
    num_warps: int


def blocks(n_classes: int, n_mentors: int, warp_size: int) -> Blocks | None:
    """Blocks for a pass that keeps M + 1 rows of logits and the gradient in registers.

    A warp takes a row, or several where a row has fewer columns than give each thread four (the
    widest float32 load), and no more warps share one than the registers call for, since each
    reduction across warps costs a barrier. None if the rows do not fit: `tile_blocks`.
    """
    block_c = triton.next_power_of_2(n_classes)
    rows = max(1, 4 * warp_size // block_c)
    num_warps = 1
    while (n_mentors + 2) * rows * block_c > _MAX_VALUES_PER_THREAD * warp_size * num_warps:
        num_warps *= 2
    return Blocks(block_c, rows, num_warps) if num_warps * warp_size <= _MAX_THREADS else None


def tile_blocks(warp_size: int) -> Blocks:
    """Blocks for the sweeps over tiles: four columns for each of 256 threads."""
    return Blocks(BLOCK_C=1024, ROWS=1, num_warps=256 // warp_size)


def scaling_blocks(n_classes: int) -> Blocks:
    """Blocks of 1024 elements for the elementwise backward, eight a thread."""
    block_c = min(triton.next_power_of_2(n_classes), 1024)
    return Blocks(block_c, 1024 // block_c, num_warps=4)


def sum_blocks(n_lines: int) -> dict[str, int]:
    """Blocks in which the last program sums so many lines: 1024 numbers at a time."""
    block_lines = triton.next_power_of_2(n_lines)
    return {"BLOCK_LINES": block_lines, "BLOCK_R": 1024 // block_lines}


def alignment(strides: list[int]) -> int:
    """Largest power of two up to 16 that divides every row stride.

    Strides reach the kernels as multiples of it, for only then does the compiler know how the
    rows are aligned, and loads 16 bytes at a time where it may.
    """
    common = 16
    for stride in strides:
        while stride % common:
            common //= 2
    return common


class Outputs(NamedTuple):
    """What a launch gives."""

    loss: Tensor
    """float32, 0-d, or [B] for reduction "none"."""
    grad: Tensor | None
    """[B, C] in the student's dtype: each row's own gradient, or the finished one."""
    count: Tensor | None
    """float32, 0-d: the valid rows, at least 1; None for reduction "none" without report."""
    report: Tensor | None
    """float32 [4M + 2]: active share, rank weight, temperature, KL (M each), confidence, task."""


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Inputs(NamedTuple):
    """Inputs as the kernels take them, and the arguments that describe them."""

    student: Tensor
    mentors: tuple[Tensor, ...]
    targets: Tensor
    grid: tuple[int]
    tiled: bool
    arguments: dict[str, Any]


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _prepare(
    student: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> _Inputs:
    n_rows, n_classes = student.shape
    student = _rows(student)
    mentors = [_rows(mentor) for mentor in mentors]
    soft = targets.dim() == 2
    targets = _rows(targets) if soft else targets.contiguous()
    strides = [logits.stride(0) for logits in (student, *mentors)]
    target_stride = targets.stride(0) if soft else 0
    align = alignment([*strides, target_stride])
    cut = blocks(n_classes, len(mentors), WARP_SIZE)
    tiled = cut is None
    if tiled:
        cut = tile_blocks(WARP_SIZE)
    arguments = {
        "student_stride": strides[0] // align,
        "mentor_strides": tuple(stride // align for stride in strides[1:]),
        "target_stride": target_stride // align if soft else None,
        "n_rows": n_rows,
        "label_smoothing": float(label_smoothing) if label_smoothing else None,
        "ignore_index": ignore_index,
        "C": n_classes,
        "BLOCK_C": cut.BLOCK_C,
        "ALIGN": align,
        "num_warps": cut.num_warps,
    }
    if not tiled:
        arguments["ROWS"] = cut.ROWS
    grid = (triton.cdiv(n_rows, cut.ROWS),)
    return _Inputs(student, tuple(mentors), targets, grid, tiled, arguments)


def confidence_sums(
    student: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    *,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Sums over the valid rows of ℓ_k, the student's first, and their number: float32 [M + 2]."""
    n_rows, lines = student.shape[0], len(mentors) + 2
    if n_rows == 0:
        return student.new_zeros(lines, dtype=torch.float32)
    sums = student.new_empty(lines, dtype=torch.float32)
    scratch = student.new_empty((lines, n_rows), dtype=torch.float32)
    inputs = _prepare(student, mentors, targets, label_smoothing, ignore_index)
    kernel = tiled_confidence_kernel if inputs.tiled else confidence_kernel
    with on_device(student.device):
        kernel[inputs.grid](
            inputs.student,
            inputs.mentors,
            inputs.targets,
            scratch,
            sums,
            _counter(student.device),
            **inputs.arguments,
            **sum_blocks(lines),
        )
    return sums


def classroom_loss_and_grad(
    student: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    *,
    temperature: float,
    knowledge_filter: str,
    mentoring: str,
    weighting: str,
    task_weight: float | None,
    rank_decimals: int | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
    with_report: bool,
    finished_grad: bool = False,
    scale: Tensor | None = None,
) -> Outputs:
    """Loss, gradient and report in one launch.

    Args:
        student: [B, C]; mentors: M tensors [B, C]; any row stride, which is used as it is, and
            any class stride, which is made 1 by a copy if it is not.
        ell_sums: `confidence_sums` for ranking "batch", None for ranking "sample".
        task_weight: None for the student's confidence.
        with_grad: whether to compute the gradient; with_report: likewise.
        finished_grad: multiply the gradient by ``scale`` and, for the mean, divide it by the
            valid rows.
        scale: one number on the device, or None for 1.

    """
    n_rows, n_classes = student.shape
    n_mentors = len(mentors)
    new = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    grad = new((n_rows, n_classes), dtype=student.dtype) if with_grad else None
    report = new(4 * n_mentors + 2) if with_report else None
    if n_rows == 0:
        loss = new(() if reduction != "none" else 0).zero_()
        return Outputs(
            loss, grad, torch.ones_like(loss), None if report is None else report.zero_()
        )

    n_lines = 4 * n_mentors + 3 if with_report else 1
    lines = new(n_lines * n_rows + (n_lines if with_report else 0))
    summed = reduction != "none"
    loss = new(()) if summed else None
    finished = summed or with_report
    n_valid = None
    if (
        finished_grad
        and reduction == "mean"
        and targets.dim() == 1
        and n_rows > _MAX_ROWS_COUNTED_IN_PASS
    ):
        n_valid = (targets.long() != ignore_index).sum()  # uint8 would wrap the index around
    count = new(()) if finished else None
    inputs = _prepare(student, mentors, targets, label_smoothing, ignore_index)
    kernel = tiled_classroom_kernel if inputs.tiled else classroom_kernel
    with on_device(student.device):
        kernel[inputs.grid](
            inputs.student,
            inputs.mentors,
            inputs.targets,
            None if mentor_weight is None else mentor_weight.contiguous(),
            ell_sums,
            lines,
            grad,
            loss,
            count,
            report,
            _counter(student.device) if finished else None,
            scale,
            n_valid,
            temperature=float(temperature),
            task_weight=None if task_weight is None else float(task_weight),
            share_scale=None if rank_decimals is None else float(10**rank_decimals),
            KNOWLEDGE_FILTER=knowledge_filter,
            MENTORING=mentoring,
            RANK_WEIGHTING=weighting == "rank",
            MEAN=reduction == "mean",
            FINISHED_GRAD=finished_grad,
            **inputs.arguments,
            **sum_blocks(n_lines),
        )
    return Outputs(loss if summed else lines[:n_rows], grad, count, report)


def scale_rows(grad: Tensor, factor: Tensor, count: Tensor | None) -> Tensor:
    """grad [B, C] · factor (0-d, or [B] of any stride) / count, in float32, in grad's dtype."""
    out = torch.empty_like(grad)
    n_rows, n_classes = grad.shape
    if n_rows == 0:
        return out
    cut = scaling_blocks(n_classes)
    with on_device(grad.device):
        scale_rows_kernel[(triton.cdiv(n_rows, cut.ROWS), triton.cdiv(n_classes, cut.BLOCK_C))](
            grad,
            factor,
            count,
            out,
            factor.stride(0) if factor.dim() else 0,
            n_rows,
            C=n_classes,
            **cut._asdict(),
        )
    return out


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


def _counter(device: torch.device) -> Tensor:
    if device.type == "cpu":  # the interpreter
        return torch.zeros(1, dtype=torch.int32)
    if device not in _counters:
        _counters[device] = _Counters(device)
    return _counters[device].take(torch.cuda.current_stream(device))
