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

from classroomkd.kernels.counters import launch_state
from classroomkd.kernels.launch_plan import WARP_SIZE, Plan, classroom_plan, scaling_plan
from classroomkd.kernels.layout import as_read, new_gradient
from classroomkd.kernels.report_layout import report_size

if TYPE_CHECKING:
    from classroomkd.loss.options import LossOptions

MAX_MENTORS = 16
MAX_CLASSES = 262_144

_Batch = tuple[Tensor, Sequence[Tensor], Tensor]  # student, mentors, targets


class LaunchOutputs(NamedTuple):
    """The tensors that a launch writes."""

    loss: Tensor
    """float32, 0-d, or [N] for reduction "none"."""
    grad: Tensor | None
    """Like the student's logits: each row's own, without weight; with ``scale_grad`` the loss's."""
    count: Tensor | None
    """float32, 0-d: what a mean is divided by; None with ``scale_grad``, and for reduction "none"
    without report."""
    report: Tensor | None
    """float32, as ``report_layout`` describes."""


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


def _planned(
    batch: _Batch, options: LossOptions, repeated: Repeated | None, **how: Any
) -> tuple[_Batch, Plan, Repeated | None]:
    """The batch as it is launched, a new plan for it, and where that is kept."""
    rows = as_read(*batch)
    plan = classroom_plan(*rows, options, **how)
    given = batch[0], *batch[1], batch[2]
    if any(a is not b for a, b in zip(given, (rows[0], *rows[1], rows[2]), strict=True)):
        repeated = None  # it is a plan for copies, which every call has to make
    return rows, plan, repeated


def _room_for_sums(plan: Plan, student: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The programs' statistics, and a state."""
    if not plan.n_stats:
        return None, None
    stats = student.new_empty(plan.n_stats, dtype=torch.float32)
    return stats, launch_state(student.device)


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
    if student.numel() == 0:
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
    stats, state = _room_for_sums(plan, student)
    no_weights, no_grad, no_report = (None,) * 5, None, (None,) * 2
    tensors = (
        *(student, tuple(mentors), targets, *no_weights),
        *(stats, no_grad, sums, *no_report, state),
    )
    return sums, Launch(plan, tensors, repeated)


def classroom_loss_and_grad(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    options: LossOptions,
    repeated: Repeated | None = None,
    **wanted: Any,
) -> LaunchOutputs:
    """Loss, gradient and report in one launch; arguments as for `classroom_launch`."""
    outputs, launch = classroom_launch(
        *(student, mentors, targets, row_weight, mentor_weight, ell_sums, options, repeated),
        **wanted,
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
        student: [B, C], or dense [B, C, P]; mentors: M of the same shape. `as_read` says what is
            copied.
        targets: class indices, [N] for N rows, or class probabilities of the student's shape.
        row_weight: [N], multiplies a row's whole loss; a mean is divided by its sum (1 for 0).
        ell_sums: `confidence_sums` for ranking "batch", None for ranking "sample".
        with_grad: whether to compute the gradient; with_report: likewise.
        scale_grad: multiply the gradient by ``scale`` and the rows' weights and, for the mean,
            divide it as the loss.
        scale: one number on the device, or None for 1.
        repeated: where the launch is kept for the next one of its kind, or found.

    """
    n_rows = student.numel() // student.shape[1]
    by_row = options.reduction == "none"
    new = student.new_zeros if n_rows == 0 else student.new_empty
    loss = new(n_rows if by_row else (), dtype=torch.float32)
    report = new(report_size(len(mentors)), dtype=torch.float32) if with_report else None
    grad = new_gradient(student) if with_grad else None
    if n_rows == 0:
        return LaunchOutputs(loss, grad, torch.ones_like(loss), report), None
    counted = not scale_grad and (with_report or not by_row)
    count = None
    if counted:
        count = new((), dtype=torch.float32) if by_row else torch.empty_like(loss)

    batch: _Batch = student, mentors, targets
    plan = repeated.plan if repeated else None
    if plan is None:
        how = {"with_report": with_report, "scale_grad": scale_grad, "warp_size": warp_size}
        batch, plan, repeated = _planned(batch, options, repeated, **how)
        student, mentors, targets = batch
    if mentor_weight is not None:
        mentor_weight = mentor_weight.contiguous()
    weight_sum = None
    if row_weight is not None:
        row_weight = row_weight.float().contiguous()
        weight_sum = row_weight.sum() if options.reduction == "mean" else None
    stats, state = _room_for_sums(plan, student)
    tensors = (
        *(student, tuple(mentors), targets, row_weight, mentor_weight, ell_sums, scale),
        *(weight_sum, stats, grad, loss, count, report, state),
    )
    return LaunchOutputs(loss, grad, count, report), Launch(plan, tensors, repeated)


def scale_rows(
    grad: Tensor,
    factor: Tensor,
    row_weight: Tensor | None,
    count: Tensor | None,
    repeated: Repeated | None = None,
) -> Tensor:
    """grad · factor · row_weight / count, in float32, in grad's dtype and memory layout.

    Args:
        grad: [B, C] or [B, C, P], as `new_gradient` lays it out.
        factor: 0-d, or [N] of any stride; row_weight: [N]; count: 0-d.
        repeated: as for `classroom_launch`.

    """
    if grad.numel() == 0:
        return torch.empty_like(grad)
    out, launch = scaling_launch(grad, factor, row_weight, count, repeated)
    launch.run(grad.device)
    return out


def scaling_launch(
    grad: Tensor,
    factor: Tensor,
    row_weight: Tensor | None,
    count: Tensor | None,
    repeated: Repeated | None = None,
) -> tuple[Tensor, Launch]:
    """The result of `scale_rows`, still to be written, and the launch that writes it."""
    out = torch.empty_like(grad)
    plan = repeated.plan if repeated else None
    tensors = grad, factor, row_weight, count, out
    return out, Launch(plan or scaling_plan(grad, factor), tensors, repeated)
