"""Launching the kernels: block sizes, strides, outputs. Nothing here reads a value off the device.

Tensors come checked (``classroomkd/loss/inputs.py``) and are float32, float16 or bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from classroomkd.kernels.classroom import classroom_kernel, confidence_kernel, scale_rows_kernel
from classroomkd.kernels.counters import counter
from classroomkd.kernels.report_layout import report_size
from classroomkd.kernels.tiled import tiled_classroom_kernel
from classroomkd.kernels.tiled_scan import tiled_confidence_kernel

if TYPE_CHECKING:
    from classroomkd.loss.options import LossOptions

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


def sum_blocks(n_stats: int) -> dict[str, int]:
    """Blocks in which the last program sums so many row statistics: 1024 numbers at a time."""
    block_stats = triton.next_power_of_2(n_stats)
    return {"BLOCK_STATS": block_stats, "BLOCK_R": 1024 // block_stats}


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


class LaunchOutputs(NamedTuple):
    """The tensors that a launch writes."""

    loss: Tensor
    """float32, 0-d, or [B] for reduction "none"."""
    grad: Tensor | None
    """[B, C] in the student's dtype: each row's own gradient, or with ``scale_grad`` the loss's."""
    count: Tensor | None
    """float32, 0-d: the valid rows, at least 1; None for reduction "none" without report."""
    report: Tensor | None
    """float32, as ``report_layout`` describes."""


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Launch(NamedTuple):
    """A kernel with all of its arguments by name: to be run here, or compiled for another GPU."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    blocks: Blocks

    def run(self, device: torch.device) -> None:
        """Run it on that device's current stream."""
        start(self.kernel, self.grid, self.arguments, self.blocks.num_warps, device)


def start(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    num_warps: int,
    device: torch.device,
) -> None:
    """Run a kernel on that device's current stream. Every launch of the project comes through here.

    Tests put what executes compiled kernels on a CPU in its place.
    """
    with on_device(device):
        kernel[grid](**arguments, num_warps=num_warps)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _prepare(
    single_pass: triton.JITFunction,
    tiled: triton.JITFunction,
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    options: LossOptions,
    warp_size: int,
) -> Launch:
    """Which of the two kernels is launched, and the arguments that both halves take."""
    n_rows, n_classes = student.shape
    student = _rows(student)
    mentors = [_rows(mentor) for mentor in mentors]
    soft = targets.dim() == 2
    targets = _rows(targets) if soft else targets.contiguous()
    strides = [logits.stride(0) for logits in (student, *mentors)]
    target_stride = targets.stride(0) if soft else 0
    align = alignment([*strides, target_stride])
    cut = blocks(n_classes, len(mentors), warp_size)
    kernel = tiled if cut is None else single_pass
    if cut is None:
        cut = tile_blocks(warp_size)
    arguments = {
        "student_ptr": student,
        "mentor_ptrs": tuple(mentors),
        "target_ptr": targets,
        "counter_ptr": None,
        "student_stride": strides[0] // align,
        "mentor_strides": tuple(stride // align for stride in strides[1:]),
        "target_stride": target_stride // align if soft else None,
        "n_rows": n_rows,
        "label_smoothing": float(options.label_smoothing) if options.label_smoothing else None,
        "ignore_index": options.ignore_index,
        "C": n_classes,
        "BLOCK_C": cut.BLOCK_C,
        "ALIGN": align,
    }
    if kernel is single_pass:
        arguments["ROWS"] = cut.ROWS
    return Launch(kernel, (triton.cdiv(n_rows, cut.ROWS),), arguments, cut)


def confidence_sums(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    options: LossOptions,
) -> Tensor:
    """Sums over the valid rows of ℓ_k, the student's first, and their number: float32 [M + 2]."""
    if student.shape[0] == 0:
        return student.new_zeros(len(mentors) + 2, dtype=torch.float32)
    sums, launch = confidence_launch(student, mentors, targets, options)
    launch.run(student.device)
    return sums


def confidence_launch(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    options: LossOptions,
    *,
    warp_size: int = WARP_SIZE,
) -> tuple[Tensor, Launch]:
    """The result of `confidence_sums`, still to be written, and the launch that writes it."""
    n_rows, n_sums = student.shape[0], len(mentors) + 2
    sums = student.new_empty(n_sums, dtype=torch.float32)
    launch = _prepare(
        confidence_kernel,
        tiled_confidence_kernel,
        student,
        mentors,
        targets,
        options,
        warp_size,
    )
    launch.arguments.update(
        ell_ptr=student.new_empty((n_sums, n_rows), dtype=torch.float32),
        sums_ptr=sums,
        counter_ptr=counter(student.device),
        **sum_blocks(n_sums),
    )
    return sums, launch


def classroom_loss_and_grad(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    options: LossOptions,
    **wanted: Any,
) -> LaunchOutputs:
    """Loss, gradient and report in one launch; arguments as for `classroom_launch`."""
    outputs, launch = classroom_launch(
        student, mentors, targets, mentor_weight, ell_sums, options, **wanted
    )
    if launch is not None:
        launch.run(student.device)
    return outputs


def classroom_launch(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    options: LossOptions,
    *,
    with_grad: bool,
    with_report: bool,
    scale_grad: bool = False,
    scale: Tensor | None = None,
    warp_size: int = WARP_SIZE,
) -> tuple[LaunchOutputs, Launch | None]:
    """The outputs, still to be written, and the launch that writes them; None if nothing is to be.

    Args:
        student: [B, C]; mentors: M tensors [B, C]; any row stride, which is used as it is, and
            any class stride, which is made 1 by a copy if it is not.
        ell_sums: `confidence_sums` for ranking "batch", None for ranking "sample".
        with_grad: whether to compute the gradient; with_report: likewise.
        scale_grad: multiply the gradient by ``scale`` and, for the mean, divide it by the
            valid rows.
        scale: one number on the device, or None for 1.

    """
    n_rows, n_classes = student.shape
    n_mentors = len(mentors)
    reduction, decimals = options.reduction, options.rank_decimals
    task_weight = options.fixed_task_weight
    new = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    grad = new((n_rows, n_classes), dtype=student.dtype) if with_grad else None
    report = new(report_size(n_mentors)) if with_report else None
    if n_rows == 0:
        loss = new(() if reduction != "none" else 0).zero_()
        report = None if report is None else report.zero_()
        return LaunchOutputs(loss, grad, torch.ones_like(loss), report), None

    n_stats = 1 + report_size(n_mentors) if with_report else 1
    row_stats = new(n_stats * n_rows + (n_stats if with_report else 0))
    summed = reduction != "none"
    loss = new(()) if summed else None
    reduced = summed or with_report
    n_valid = None
    if (
        scale_grad
        and reduction == "mean"
        and targets.dim() == 1
        and n_rows > _MAX_ROWS_COUNTED_IN_PASS
    ):
        n_valid = (
            targets.long() != options.ignore_index
        ).sum()  # uint8 would wrap the index around
    count = new(()) if reduced else None
    launch = _prepare(
        classroom_kernel,
        tiled_classroom_kernel,
        student,
        mentors,
        targets,
        options,
        warp_size,
    )
    launch.arguments.update(
        mentor_weight_ptr=None if mentor_weight is None else mentor_weight.contiguous(),
        ell_sums_ptr=ell_sums,
        row_stats_ptr=row_stats,
        grad_ptr=grad,
        loss_ptr=loss,
        count_ptr=count,
        report_ptr=report,
        counter_ptr=counter(student.device) if reduced else None,
        scale_ptr=scale,
        n_valid_ptr=n_valid,
        temperature=float(options.temperature),
        weight_scale=float(options.mentor_weight_for(n_classes, n_mentors)),
        task_weight=None if task_weight is None else float(task_weight),
        share_scale=None if decimals is None else float(10**decimals),
        KNOWLEDGE_FILTER=options.knowledge_filter,
        MENTORING=options.mentoring,
        RANK_WEIGHTING=options.weighting == "rank",
        MEAN=reduction == "mean",
        SCALE_GRAD=scale_grad,
        **sum_blocks(n_stats),
    )
    return LaunchOutputs(loss if summed else row_stats[:n_rows], grad, count, report), launch


def scale_rows(grad: Tensor, factor: Tensor, count: Tensor | None) -> Tensor:
    """grad [B, C] · factor (0-d, or [B] of any stride) / count, in float32, in grad's dtype."""
    if grad.shape[0] == 0:
        return torch.empty_like(grad)
    out, launch = scaling_launch(grad, factor, count)
    launch.run(grad.device)
    return out


def scaling_launch(grad: Tensor, factor: Tensor, count: Tensor | None) -> tuple[Tensor, Launch]:
    """The result of `scale_rows`, still to be written, and the launch that writes it."""
    out = torch.empty_like(grad)
    n_rows, n_classes = grad.shape
    cut = scaling_blocks(n_classes)
    arguments = {
        "grad_ptr": grad,
        "factor_ptr": factor,
        "count_ptr": count,
        "out_ptr": out,
        "factor_stride": factor.stride(0) if factor.dim() else 0,
        "n_rows": n_rows,
        "C": n_classes,
        "BLOCK_C": cut.BLOCK_C,
        "ROWS": cut.ROWS,
    }
    grid = (triton.cdiv(n_rows, cut.ROWS), triton.cdiv(n_classes, cut.BLOCK_C))
    return out, Launch(scale_rows_kernel, grid, arguments, cut)
