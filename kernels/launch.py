"""Launching the kernels: block sizes, strides, outputs. Nothing here reads a value off the device.

Tensors come checked (``classroomkd/loss/options.py``) and are float32, float16 or bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from classroomkd.kernels.classroom import classroom_kernel, confidence_kernel, scale_rows_kernel

MAX_MENTORS = 16
WARP_SIZE = 64 if torch.version.hip else 32
_MAX_THREADS = 512
# 32-bit values a thread may hold for logits and gradient. The kernels need about 50 registers
# besides, and 512 threads leave 128 each.
_MAX_VALUES_PER_THREAD = 80


class Blocks(NamedTuple):
    """How a kernel's work is cut up: ROWS rows of BLOCK_C columns for num_warps warps."""

    BLOCK_C: int
    ROWS: int
    num_warps: int


def blocks(n_classes: int, n_mentors: int, warp_size: int) -> Blocks | None:
    """Blocks for a pass that keeps M + 1 rows of logits and the gradient in registers.

    A warp takes a row, or several where a row has fewer columns than give each thread four (the
    widest float32 load), and no more warps share one than the registers call for, since each
    reduction across warps costs a barrier. None if the rows do not fit.
    """
    block_c = triton.next_power_of_2(n_classes)
    rows = max(1, 4 * warp_size // block_c)
    num_warps = 1
    while (n_mentors + 2) * rows * block_c > _MAX_VALUES_PER_THREAD * warp_size * num_warps:
        num_warps *= 2
    return Blocks(block_c, rows, num_warps) if num_warps * warp_size <= _MAX_THREADS else None


def fits(n_classes: int, n_mentors: int) -> bool:
    """Whether the kernels take so many classes and mentors."""
    return n_mentors <= MAX_MENTORS and blocks(n_classes, n_mentors, WARP_SIZE) is not None


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


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def classroom_rows(
    student: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    *,
    temperature: float,
    ranking: str,
    knowledge_filter: str,
    mentoring: str,
    weighting: str,
    task_weight: float | None,
    rank_decimals: int | None,
    label_smoothing: float,
    ignore_index: int,
    with_grad: bool,
    with_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each row's loss, its gradient and its statistics.

    Args:
        student: [B, C]; mentors: M tensors [B, C]; any row stride, which is used as it is, and
            any class stride, which is made 1 by a copy if it is not.
        task_weight: None for the student's confidence.
        with_grad: whether to compute the gradient; with_statistics: likewise.

    Returns:
        loss float32 [B]; d loss[b] / d student[b] [B, C] in the student's dtype; statistics
        float32 [4M + 2, B] as `classroom_kernel` describes them.

    """
    n_rows, n_classes = student.shape
    student = _rows(student)
    mentors = [_rows(mentor) for mentor in mentors]
    soft = targets.dim() == 2
    targets = _rows(targets) if soft else targets.contiguous()
    new = {"device": student.device}
    loss = torch.empty(n_rows, dtype=torch.float32, **new)
    grad = torch.empty((n_rows, n_classes), dtype=student.dtype, **new) if with_grad else None
    statistics = None
    if with_statistics:
        statistics = torch.empty((4 * len(mentors) + 2, n_rows), dtype=torch.float32, **new)
    if n_rows == 0:
        return loss, grad, statistics

    strides = [logits.stride(0) for logits in (student, *mentors)]
    align = alignment(strides)
    cut = blocks(n_classes, len(mentors), WARP_SIZE)
    grid = (triton.cdiv(n_rows, cut.ROWS),)
    shared = {
        "student_stride": strides[0] // align,
        "mentor_strides": tuple(stride // align for stride in strides[1:]),
        "target_stride": targets.stride(0) if soft else None,
        "n_rows": n_rows,
        "label_smoothing": float(label_smoothing) if label_smoothing else None,
        "ignore_index": ignore_index,
        "C": n_classes,
        "ALIGN": align,
        **cut._asdict(),
    }
    batch_ell = None
    if ranking == "batch":
        ell = torch.empty((1 + len(mentors), n_rows), dtype=torch.float32, **new)
        confidence_kernel[grid](student, tuple(mentors), targets, ell, **shared)
        n_valid = n_rows if soft else (targets != ignore_index).sum().clamp_min(1)
        batch_ell = (ell.sum(1) / n_valid).clamp_min(torch.finfo(torch.float32).min)
    classroom_kernel[grid](
        student,
        tuple(mentors),
        targets,
        mentor_weight,
        batch_ell,
        loss,
        grad,
        statistics,
        temperature=float(temperature),
        task_weight=None if task_weight is None else float(task_weight),
        share_scale=None if rank_decimals is None else float(10**rank_decimals),
        KNOWLEDGE_FILTER=knowledge_filter,
        MENTORING=mentoring,
        RANK_WEIGHTING=weighting == "rank",
        **shared,
    )
    return loss, grad, statistics


def scaling_blocks(n_classes: int) -> Blocks:
    """Blocks of 1024 elements for the elementwise backward, eight a thread."""
    block_c = min(triton.next_power_of_2(n_classes), 1024)
    return Blocks(block_c, 1024 // block_c, num_warps=4)


def scale_rows(grad: Tensor, factor: Tensor) -> Tensor:
    """grad [B, C] times factor [B] (of any stride, 0 too), in float32, rounded to grad's dtype."""
    out = torch.empty_like(grad)
    n_rows, n_classes = grad.shape
    if n_rows == 0:
        return out
    cut = scaling_blocks(n_classes)
    scale_rows_kernel[(triton.cdiv(n_rows, cut.ROWS), triton.cdiv(n_classes, cut.BLOCK_C))](
        grad,
        factor,
        out,
        factor.stride(0),
        n_rows,
        C=n_classes,
        **cut._asdict(),
    )
    return out
