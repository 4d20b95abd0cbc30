"""Launch the kernels: block sizes, strides, outputs. The host never waits for the device.

``classroomkd/loss/inputs.py`` has checked the tensors; they are float32, float16 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from classroomkd.kernels.blocks import Blocks, blocks, scaling_blocks, sum_blocks
from classroomkd.kernels.classroom import classroom_kernel
from classroomkd.kernels.counters import launch_state
from classroomkd.kernels.layout import alignment, unit_strides
from classroomkd.kernels.report_layout import report_size
from classroomkd.kernels.scaling import scale_rows_kernel

if TYPE_CHECKING:
    from classroomkd.loss.options import LossOptions

MAX_MENTORS = 16
MAX_CLASSES = 262_144
WARP_SIZE = 64 if torch.version.hip else 32


_Batch = tuple[Tensor, Sequence[Tensor], Tensor]  # student, mentors, targets


class LaunchOutputs(NamedTuple):
    """The tensors that a launch writes."""

    loss: Tensor
    """float32, 0-d, or [B] for reduction "none"."""
    grad: Tensor | None
    """[B, C] in the student's dtype: each row's own gradient, or with ``scale_grad`` the loss's."""
    count: Tensor | None
    """float32, 0-d: the valid rows, at least 1; None with ``scale_grad``, and for reduction "none"
    without report."""
    report: Tensor | None
    """float32, as ``report_layout`` describes."""


class Plan(NamedTuple):
    """A launch without its tensors: determined by shapes, strides, dtypes and options alone."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    values: dict[str, Any]
    """By name, every argument of the kernel that is not a tensor; in its order, as they follow."""
    blocks: Blocks
    row_stats: int = 0
    """The numbers that the rows leave to be summed."""


class Repeated:
    """What a launch leaves to the next one of its kind; ``repeated.py`` says which these are."""

    plan: Plan | None = None
    run: Callable[..., object] | None = None
    """Launches the kernel that Triton compiled, with all its arguments in order."""


class Launch(NamedTuple):
    """A plan with tensors, to be run here or compiled for another GPU."""

    plan: Plan
    tensors: tuple[Tensor | tuple[Tensor, ...] | None, ...]
    """The kernel's first arguments, in its order."""
    repeated: Repeated | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """All of the kernel's, by name."""
        return dict(zip(self.plan.kernel.arg_names, self.tensors, strict=False)) | self.plan.values

    def run(self, device: torch.device) -> None:
        """Run it on that device's current stream."""
        plan, tensors, repeated = self
        if repeated and repeated.run and not plan.kernel.pre_run_hooks:
            with on_device(device):
                repeated.run(*tensors, *plan.values.values())
            return
        options = plan.blocks.compiler_options()
        compiled = start(plan.kernel, plan.grid, self.arguments, options, device)
        if repeated:
            repeated.plan = plan
            # On AMD's GPUs Triton looks at the tensors' size in memory too. The interpreter gives
            # nothing, and Triton's compilation in the background no kernel yet.
            if isinstance(compiled, CompiledKernel) and not torch.version.hip:
                repeated.run = compiled[(*plan.grid, 1, 1)]


def start(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    options: dict[str, int],
    device: torch.device,
) -> object:
    """Run a kernel on that device's current stream, and return what Triton compiled, if it did.

    All launches of the project use this function, except those that repeat one. ``options`` are the
    compiler's. Tests replace this function to execute compiled kernels on a CPU.
    """
    with on_device(device):
        return kernel[grid](**arguments, **options)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Select the tensors' device: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
    """How a batch is launched; arguments as for `classroom_launch`, with unit class strides.

    ``sums`` asks for `confidence_sums` instead of loss and gradient.
    """
    n_rows, n_classes = student.shape
    n_mentors = len(mentors)
    soft = targets.dim() == 2
    align = alignment([student, *mentors, *([targets] if soft else [])])
    dtypes = {logits.dtype for logits in (student, *mentors)}
    cut = blocks(n_classes, n_mentors, max(dtype.itemsize for dtype in dtypes), warp_size)
    n_programs = triton.cdiv(n_rows, cut.ROWS)
    n_stats = 2 + (n_mentors if sums else report_size(n_mentors) if with_report else 0)
    summing = sum_blocks(n_stats, n_programs, cut, warp_size)
    summed = sums or with_report or options.reduction != "none"
    task_weight, decimals = options.fixed_task_weight, options.rank_decimals
    values = {
        "student_stride": student.stride(0) // align,
        "mentor_strides": tuple(mentor.stride(0) // align for mentor in mentors),
        "target_stride": targets.stride(0) // align if soft else None,
        "n_rows": n_rows,
        "group_programs": summing.group_programs,
        "temperature": float(options.temperature),
        "weight_scale": float(options.mentor_weight_for(n_classes, n_mentors)),
        "task_weight": None if task_weight is None else float(task_weight),
        "label_smoothing": float(options.label_smoothing) if options.label_smoothing else None,
        "share_scale": None if decimals is None else float(10**decimals),
        "ignore_index": options.ignore_index,
        "C": n_classes,
        "BLOCK_C": cut.BLOCK_C,
        "PIECES": cut.PIECES,
        "V": cut.V,
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
    row_stats = (
        n_stats * (n_rows + triton.cdiv(n_programs, summing.group_programs)) if summed else 0
    )
    return Plan(classroom_kernel, (n_programs,), values, cut, row_stats)


def _planned(
    batch: _Batch, options: LossOptions, repeated: Repeated | None, **how: Any
) -> tuple[_Batch, Plan, Repeated | None]:
    """The batch as it is launched, a new plan for it, and where that is kept."""
    rows = unit_strides(*batch)
    plan = classroom_plan(*rows, options, **how)
    given = batch[0], *batch[1], batch[2]
    if any(a is not b for a, b in zip(given, (rows[0], *rows[1], rows[2]), strict=True)):
        repeated = None  # it is a plan for copies, which every call has to make
    return rows, plan, repeated


def _room_for_sums(plan: Plan, student: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The rows' statistics, and a state."""
    if not plan.row_stats:
        return None, None
    row_stats = student.new_empty(plan.row_stats, dtype=torch.float32)
    return row_stats, launch_state(student.device)


def confidence_sums(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    options: LossOptions,
    repeated: Repeated | None = None,
) -> Tensor:
    """Sums of ℓ_k over the valid rows, the student's first, and the number of these rows.

    float32 [M + 2].
    """
    if student.shape[0] == 0:
        return student.new_zeros(len(mentors) + 2, dtype=torch.float32)
    sums, launch = confidence_launch(student, mentors, targets, options, repeated)
    launch.run(student.device)
    return sums


def confidence_launch(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    options: LossOptions,
    repeated: Repeated | None = None,
    *,
    warp_size: int = WARP_SIZE,
) -> tuple[Tensor, Launch]:
    """The result of `confidence_sums`, still to be written, and the launch that writes it."""
    batch: _Batch = student, mentors, targets
    plan = repeated.plan if repeated else None
    if plan is None:
        batch, plan, repeated = _planned(batch, options, repeated, sums=True, warp_size=warp_size)
    student, mentors, targets = batch
    sums = student.new_empty(len(mentors) + 2, dtype=torch.float32)
    row_stats, state = _room_for_sums(plan, student)
    no_weights_to_scale = (None,) * 3
    no_grad, no_report = None, (None,) * 2
    tensors = (
        *(student, tuple(mentors), targets, *no_weights_to_scale),
        *(row_stats, no_grad, sums, *no_report, state),
    )
    return sums, Launch(plan, tensors, repeated)


def classroom_loss_and_grad(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    options: LossOptions,
    repeated: Repeated | None = None,
    **wanted: Any,
) -> LaunchOutputs:
    """Loss, gradient and report in one launch; arguments as for `classroom_launch`."""
    outputs, launch = classroom_launch(
        student, mentors, targets, mentor_weight, ell_sums, options, repeated, **wanted
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
    repeated: Repeated | None = None,
    *,
    with_grad: bool,
    with_report: bool,
    scale_grad: bool = False,
    scale: Tensor | None = None,
    warp_size: int = WARP_SIZE,
) -> tuple[LaunchOutputs, Launch | None]:
    """The outputs, not yet written, and the launch that writes them; None if there is none.

    Args:
        student: [B, C]; mentors: M tensors [B, C]; any row stride, used without a copy, and any
            class stride, copied if it is not 1.
        ell_sums: `confidence_sums` for ranking "batch", None for ranking "sample".
        with_grad: whether to compute the gradient; with_report: likewise.
        scale_grad: multiply the gradient by ``scale`` and, for the mean, divide it by the
            valid rows.
        scale: one number on the device, or None for 1.
        repeated: where the launch is kept for the next one of its kind, or found.

    """
    n_rows = student.shape[0]
    by_row = options.reduction == "none"
    new = student.new_zeros if n_rows == 0 else student.new_empty
    loss = new(n_rows if by_row else (), dtype=torch.float32)
    report = new(report_size(len(mentors)), dtype=torch.float32) if with_report else None
    grad = None
    if with_grad:
        grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    if n_rows == 0:
        return LaunchOutputs(loss, grad, torch.ones_like(loss), report), None
    counted = not scale_grad and (with_report or not by_row)
    count = new((), dtype=torch.float32) if counted else None

    batch: _Batch = student, mentors, targets
    plan = repeated.plan if repeated else None
    if plan is None:
        how = {"with_report": with_report, "scale_grad": scale_grad, "warp_size": warp_size}
        batch, plan, repeated = _planned(batch, options, repeated, **how)
        student, mentors, targets = batch
    if mentor_weight is not None:
        mentor_weight = mentor_weight.contiguous()
    row_stats, state = _room_for_sums(plan, student)
    tensors = (
        *(student, tuple(mentors), targets, mentor_weight, ell_sums, scale),
        *(row_stats, grad, loss, count, report, state),
    )
    return LaunchOutputs(loss, grad, count, report), Launch(plan, tensors, repeated)


def scale_rows(
    grad: Tensor, factor: Tensor, count: Tensor | None, repeated: Repeated | None = None
) -> Tensor:
    """grad [B, C] · factor (0-d, or [B] of any stride) / count, in float32, in grad's dtype."""
    if grad.shape[0] == 0:
        return torch.empty_like(grad)
    out, launch = scaling_launch(grad, factor, count, repeated)
    launch.run(grad.device)
    return out


def scaling_launch(
    grad: Tensor, factor: Tensor, count: Tensor | None, repeated: Repeated | None = None
) -> tuple[Tensor, Launch]:
    """The result of `scale_rows`, still to be written, and the launch that writes it."""
    out = torch.empty_like(grad)
    plan = repeated.plan if repeated else None
    return out, Launch(plan or _scaling_plan(grad, factor), (grad, factor, count, out), repeated)


def _scaling_plan(grad: Tensor, factor: Tensor) -> Plan:
    n_rows, n_classes = grad.shape
    cut = scaling_blocks(n_classes)
    values = {
        "factor_stride": factor.stride(0) if factor.dim() else 0,
        "n_rows": n_rows,
        "C": n_classes,
        "BLOCK_C": cut.BLOCK_C,
        "ROWS": cut.ROWS,
    }
    grid = (triton.cdiv(n_rows, cut.ROWS), triton.cdiv(n_classes, cut.BLOCK_C))
    return Plan(scale_rows_kernel, grid, values, cut)
