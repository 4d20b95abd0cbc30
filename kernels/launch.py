"""Launch the kernels: block sizes, strides, outputs. The host never waits for the device.

``classroomkd/loss/inputs.py`` has checked the tensors; they are float32, float16 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from classroomkd.kernels.blocks import scaling_blocks
from classroomkd.kernels.counters import launch_state
from classroomkd.kernels.launch_plan import WARP_SIZE, Plan, classroom_plan
from classroomkd.kernels.layout import alignment, as_read, flattened, in_place, new_gradient
from classroomkd.kernels.report_layout import report_size
from classroomkd.kernels.scaling import scale_rows_kernel

if TYPE_CHECKING:
    from classroomkd.loss.options import LossOptions

MAX_MENTORS = 16
MAX_CLASSES = 262_144


class LaunchOutputs(NamedTuple):
    """The tensors that a launch writes."""

    loss: Tensor
    """float32, 0-d, or [N] for reduction "none"."""
    grad: Tensor | None
    """Like the student's logits: each row's own, without weight; with ``scale_grad`` the loss's."""
    count: Tensor | None
    """float32, 0-d: what a mean is divided by; None for reduction "none" without report."""
    report: Tensor | None
    """float32, as ``report_layout`` describes."""


class Launch(NamedTuple):
    """A plan with tensors, to be run here or compiled for another GPU."""

    plan: Plan
    tensors: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """All of the kernel's, by name."""
        return self.tensors | self.plan.values

    def run(self, device: torch.device) -> None:
        """Run it on that device's current stream."""
        plan = self.plan
        start(plan.kernel, plan.grid, self.arguments, plan.blocks.compiler_options(), device)


def start(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    options: dict[str, int],
    device: torch.device,
) -> None:
    """Run a kernel on that device's current stream. All launches of the project use this function.

    ``options`` are the compiler's. Tests replace this function to execute compiled kernels on a
    CPU.
    """
    with on_device(device):
        kernel[grid](**arguments, **options)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Select the tensors' device: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _tensors(
    plan: Plan, student: Tensor, mentors: Sequence[Tensor], targets: Tensor, **others: Tensor | None
) -> dict[str, Any]:
    """By name, every argument of `classroom_kernel` that is a tensor."""
    stats = state = None
    if plan.n_stats:
        stats = student.new_empty(plan.n_stats, dtype=torch.float32)
        state = launch_state(student.device)
    names = ("row_weight", "mentor_weight", "ell_sums", "scale", "weight_sum")
    names += ("grad", "loss", "count", "report")
    return {
        "student_ptr": student,
        "mentor_ptrs": tuple(mentors),
        "target_ptr": targets,
        "stats_ptr": stats,
        "state_ptr": state,
        **{f"{name}_ptr": others.get(name) for name in names},
    }


def confidence_sums(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    options: LossOptions,
) -> Tensor:
    """Sums of ℓ_k over the valid rows, the student's first, and the number of these rows.

    float32 [M + 2].
    """
    if student.numel() == 0:
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
    batch = as_read(student, mentors, targets)
    plan = classroom_plan(*batch, options, sums=True, warp_size=warp_size)
    sums = student.new_empty(len(mentors) + 2, dtype=torch.float32)
    return sums, Launch(plan, _tensors(plan, *batch, loss=sums))


def classroom_loss_and_grad(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    options: LossOptions,
    **wanted: Any,
) -> LaunchOutputs:
    """Loss, gradient and report in one launch; arguments as for `classroom_launch`."""
    outputs, launch = classroom_launch(
        student, mentors, targets, row_weight, mentor_weight, ell_sums, options, **wanted
    )
    if launch is not None:
        launch.run(student.device)
    return outputs


def classroom_launch(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
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
    """The outputs, not yet written, and the launch that writes them; None if there is none.

    Args:
        student: [B, C], or dense [B, C, P]; mentors: M of the same shape. `as_read` says what is
            copied.
        targets: class indices, [N] for N rows, or class probabilities of the student's shape.
        row_weight: [N], multiplies a row's whole loss; a mean is divided by its sum (1 for 0).
        ell_sums: `confidence_sums` for ranking "batch", None for ranking "sample".
        with_grad: whether to compute the gradient; with_report: likewise.
        scale_grad: multiply the gradient by ``scale`` and the rows' weights and, for the mean,
            divide it as the loss.
        scale: one number on the device, or None for 1.

    """
    n_rows = student.numel() // student.shape[1]
    by_row = options.reduction == "none"
    new = torch.zeros if n_rows == 0 else torch.empty

    def numbers(*shape: int) -> Tensor:
        return new(shape, dtype=torch.float32, device=student.device)

    outputs = LaunchOutputs(
        loss=numbers(n_rows) if by_row else numbers(),
        grad=new_gradient(student) if with_grad else None,
        count=None if by_row and not with_report else numbers(),
        report=numbers(report_size(len(mentors))) if with_report else None,
    )
    if n_rows == 0:
        return outputs._replace(count=torch.ones_like(outputs.loss)), None
    batch = as_read(student, mentors, targets)
    plan = classroom_plan(
        *batch, options, with_report=with_report, scale_grad=scale_grad, warp_size=warp_size
    )
    if mentor_weight is not None:
        mentor_weight = mentor_weight.contiguous()
    weight_sum = None
    if row_weight is not None:
        row_weight = row_weight.float().contiguous()
        weight_sum = row_weight.sum() if options.reduction == "mean" else None
    others = outputs._asdict() | {
        "row_weight": row_weight,
        "weight_sum": weight_sum,
        "mentor_weight": mentor_weight,
        "ell_sums": ell_sums,
        "scale": scale,
    }
    return outputs, Launch(plan, _tensors(plan, *batch, **others))


def scale_rows(
    grad: Tensor, factor: Tensor, row_weight: Tensor | None, count: Tensor | None
) -> Tensor:
    """grad · factor · row_weight / count, in float32, in grad's dtype and memory layout.

    Args:
        grad: [B, C] or [B, C, P], as `new_gradient` lays it out.
        factor: 0-d, or [N] of any stride; row_weight: [N]; count: 0-d.

    """
    if grad.numel() == 0:
        return torch.empty_like(grad)
    out, launch = scaling_launch(grad, factor, row_weight, count)
    launch.run(grad.device)
    return out


def scaling_launch(
    grad: Tensor, factor: Tensor, row_weight: Tensor | None, count: Tensor | None
) -> tuple[Tensor, Launch]:
    """The result of `scale_rows`, still to be written, and the launch that writes it."""
    out = torch.empty_like(grad)
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
    tensors = {"grad_ptr": grad, "factor_ptr": factor, "weight_ptr": row_weight}
    tensors |= {"count_ptr": count, "out_ptr": out}
    return out, Launch(Plan(scale_rows_kernel, grid, values, cut), tensors)
