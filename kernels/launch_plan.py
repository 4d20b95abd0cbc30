"""How a batch is launched: grid, block sizes and every argument that is not a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from classroomkd.kernels.blocks import Blocks, blocks, position_blocks, scaling_blocks, sum_blocks
from classroomkd.kernels.layout import alignment, flattened, in_place
from classroomkd.kernels.one_pass import classroom_kernel
from classroomkd.kernels.report_layout import report_size
from classroomkd.kernels.scaling import scale_rows_kernel

if TYPE_CHECKING:
    from classroomkd.loss.options import LossOptions

WARP_SIZE = 64 if torch.version.hip else 32


class Plan(NamedTuple):
    """A launch without its tensors: determined by shapes, strides, dtypes and options alone."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    values: dict[str, Any]
    """By name, every argument of the kernel that is not a tensor; in its order, as they follow."""
    blocks: Blocks
    n_stats: int = 0
    """The numbers that the programs leave to be summed."""


def classroom_plan(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    options: LossOptions,
    *,
    with_report: bool = False,
    scale_grad: bool = False,
    sums: bool = False,
    warp_size: int = WARP_SIZE,
) -> Plan:
    """How a batch is launched; arguments as for `classroom_launch`, laid out by `as_read`.

    ``sums`` asks for `confidence_sums` instead of loss and gradient.
    """
    n_classes, n_mentors = student.shape[1], len(mentors)
    n_rows = student.numel() // n_classes
    soft = targets.dim() > 1
    dtypes = {logits.dtype for logits in (student, *mentors)}
    division: tuple[int | None, ...] = (None, None, None)
    if student.dim() == 3:
        align, cut = 1, position_blocks(n_mentors, warp_size)
        division = quotient(student.shape[2])
    else:
        align = alignment([student, *mentors, *([targets] if soft else [])])
        usual = not options.label_smoothing and options.mentoring != "dtkd" and len(dtypes) == 1
        demand = 2 if soft else 1 if with_report or not usual else 0
        itemsize = max(dtype.itemsize for dtype in dtypes)
        cut = blocks(n_classes, n_mentors, itemsize, warp_size, align, demand)
    n_programs = triton.cdiv(n_rows, cut.ROWS)
    n_stats = 2 + (n_mentors if sums else report_size(n_mentors) if with_report else 0)
    summing = sum_blocks(n_stats, n_programs, cut, warp_size)
    summed = sums or with_report or options.reduction != "none"
    # Negative: Triton makes a 1 a constant, and does not compile a tuple with constants passed on.
    mentor_strides = tuple(-(mentor.stride(0) // align) for mentor in mentors)
    same_stride = all(mentor.stride(0) == student.stride(0) for mentor in mentors)
    task_weight, decimals = options.fixed_task_weight, options.rank_decimals
    n_positions, image_factor, image_shift = division
    values = {
        "student_stride": student.stride(0) // align,
        "mentor_strides": None if same_stride else mentor_strides,
        "target_stride": targets.stride(0) // align if soft else None,
        "n_positions": n_positions,
        "image_factor": image_factor,
        "image_shift": image_shift,
        "n_rows": n_rows,
        "group_shift": summing.group_shift,
        "temperature": float(options.temperature),
        "weight_scale": float(options.mentor_weight_for(n_classes, n_mentors)),
        "task_weight": None if task_weight is None else float(task_weight),
        "label_smoothing": float(options.label_smoothing) if options.label_smoothing else None,
        "share_scale": None if decimals is None else float(10**decimals),
        "ignore_index": options.ignore_index,
        "C": n_classes,
        "BLOCK_C": cut.BLOCK_C,
        "PIECES": cut.PIECES,
        "LOADS": cut.LOADS,
        "V": cut.V,
        "KEEP_STUDENT": cut.KEEP_STUDENT,
        "ROWS": cut.ROWS,
        "K": triton.next_power_of_2(n_mentors + 1),
        "ALIGN": align,
        "MIXED": len(dtypes) > 1,
        "N_STATS": n_stats,
        "BLOCK_STATS": summing.BLOCK_STATS,
        "BLOCK_R": summing.BLOCK_R,
        "KNOWLEDGE_FILTER": options.knowledge_filter,
        "MENTORING": options.mentoring,
        "WEIGHTING": options.weighting,
        "REDUCTION": options.reduction,
        "SCALE_GRAD": scale_grad,
        "SUMS": sums,
    }
    n_groups = triton.cdiv(n_programs, 2**summing.group_shift)
    n_stats = n_stats * (n_programs + n_groups) if summed else 0
    return Plan(classroom_kernel, (n_programs,), values, cut, n_stats)


def scaling_plan(grad: Tensor, factor: Tensor) -> Plan:
    """How `scale_rows` of these is launched."""
    # Lines of adjacent numbers: rows, or of dense gradients in place the positions of a class.
    dense = in_place(grad)
    lines = grad.flatten(0, 1) if dense else flattened(grad)
    n_lines, n_columns = lines.shape
    cut = scaling_blocks(n_columns)
    align = alignment([lines])
    values = {
        "factor_stride": factor.stride(0) if factor.dim() else None,
        "n_lines": n_lines,
        "n_columns": n_columns // align,
        "n_classes": grad.shape[1] if dense else None,
        "ALIGN": align,
        "BLOCK_C": cut.BLOCK_C,
        "ROWS": cut.ROWS,
    }
    grid = (triton.cdiv(n_lines, cut.ROWS), triton.cdiv(n_columns, cut.BLOCK_C))
    return Plan(scale_rows_kernel, grid, values, cut)


def quotient(divisor: int) -> tuple[int, int, int]:
    """A divisor d > 1, and f, s such that n · f >> s is n // d for 0 ≤ n < 2³¹, within 63 bits."""
    shift = 31 + (divisor - 1).bit_length()
    return divisor, -(-(2**shift) // divisor), shift
