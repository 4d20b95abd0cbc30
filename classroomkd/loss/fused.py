"""The fused loss: one pass for the loss and its gradient.

Here arguments are checked and the implementation is chosen; ``operators.py`` has the operators.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from classroomkd.kernels import triton_obstacle
from classroomkd.loss import operators, plans
from classroomkd.loss.classroom_report import ClassroomReport, RowReport, unpack_report
from classroomkd.loss.definition import (
    loss_and_grad_by_definition,
    loss_by_definition,
    row_report,
)
from classroomkd.loss.inputs import KERNEL_LOGITS, check_float, either, loss_options
from classroomkd.loss.options import LossOptions
from classroomkd.loss.rows import LossWeights, Rows, as_rows
from classroomkd.loss.signatures import loss_and_grad_function, loss_function

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Triton decides whether to interpret a kernel when it is defined: at import, like this.
# While this is true, CPU tensors go to the kernels and never to the pass that numba compiles.
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_NUMBA = find_spec("numba") is not None


@loss_function
def fused_classroom_loss(
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    temperature: float = 12.0,
    ranking: str = "sample",
    knowledge_filter: str = "better",
    mentoring: str = "adaptive",
    weighting: str = "rank",
    task_weight: str | float = "confidence",
    rank_decimals: int | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mentor_weight: Tensor | float | str | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    process_group: ProcessGroup | None = None,
    return_report: bool | Literal["rows"] = False,
) -> Tensor | tuple[Tensor, ClassroomReport | RowReport]:
    """ClassroomKD's multi-mentor distillation loss, fused.

    It takes and returns the same as `classroomkd.classroom_loss`, which describes the arguments
    that are not listed here. On CUDA and ROCm tensors it runs one Triton kernel (two for ranking
    "batch") in place of some hundred PyTorch ones, in float32 arithmetic, and never waits for the
    GPU. On CPU tensors it runs one pass over the rows, compiled by numba: half a minute at the
    first call ever, a second at the first of a later process. It is `classroom_loss` itself for
    float64 logits on the CPU, on other devices, and without Triton (3.3 or newer) or numba. With
    the environment variable ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, slowly, in
    Triton's interpreter.

    Args:
        student_logits: [B, C] or [B, C, d₁, …], float16, bfloat16 or float32. The gradient has its
            dtype.
        mentor_logits: [M, B, C, …], or a sequence of M tensors of the student's shape; 1 ≤ M ≤ 16,
            dtypes may be mixed. Rows of any stride are read in place where the classes lie side by
            side, as in channels-last memory. So are up to 256 classes of [B, C, d₁, …] in memory of
            this order. What lies otherwise, or than the student's, is copied.
        targets: class indices [B, …], or class probabilities of the student's shape.
        return_report: also return a `ClassroomReport`, at the cost of 4M + 4 floats a row; or with
            "rows" a `RowReport`, computed by definition.

    Returns:
        The loss, 0-d, or [B, …] with ``reduction="none"``, float32; with ``return_report`` the pair
        (loss, report). A second derivative raises RuntimeError.

    Raises:
        ValueError, TypeError: as `classroom_loss`, on the CPU for a class index out of range also
            under torch.compile; on a GPU also for float64 logits and for more mentors or classes
            than the kernels take. On a GPU a class index out of range makes its row NaN, since
            checking it would mean waiting for the device.

    """
    options, of_mentors = loss_options(
        temperature=temperature,
        ranking=ranking,
        knowledge_filter=knowledge_filter,
        mentoring=mentoring,
        weighting=weighting,
        task_weight=task_weight,
        rank_decimals=rank_decimals,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        mentor_weight=mentor_weight,
        reduction=reduction,
    )
    loss, report = fused_loss(
        student_logits,
        mentor_logits,
        targets,
        LossWeights(of_mentors, class_weight, row_weight),
        options,
        return_report,
        process_group,
    )
    return loss if report is None else (loss, report)


@loss_and_grad_function
def fused_classroom_loss_and_grad(
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    temperature: float = 12.0,
    ranking: str = "sample",
    knowledge_filter: str = "better",
    mentoring: str = "adaptive",
    weighting: str = "rank",
    task_weight: str | float = "confidence",
    rank_decimals: int | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mentor_weight: Tensor | float | str | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    scale: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    return_report: bool | Literal["rows"] = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ClassroomReport | RowReport]:
    """`fused_classroom_loss` and its gradient together, for trainers: one launch, no autograd.

        loss, grad = fused_classroom_loss_and_grad(logits.detach(), mentor_logits, targets)
        logits.backward(grad)

    saves autograd's second pass over the gradient. With ranking "batch" there are two launches;
    weights of classes or rows are gathered and summed by PyTorch first. Arguments that are not
    listed here are those of `fused_classroom_loss`.

    Args:
        reduction: "mean" or "sum".
        scale: a floating-point tensor of one number on the logits' device, such as a gradient
            scaler's, that multiplies the gradient, not the loss, before it is rounded to the
            student's dtype.
        return_report: as for `fused_classroom_loss`.

    Returns:
        (loss, gradient) or (loss, gradient, report): the loss 0-d float32, the gradient of the
        student's shape and dtype; neither has an autograd graph.

    Raises:
        ValueError, TypeError: as `fused_classroom_loss`; also for ``reduction="none"`` and a
            ``scale`` that is not one floating-point number.

    """
    options, of_mentors = loss_options(
        temperature=temperature,
        ranking=ranking,
        knowledge_filter=knowledge_filter,
        mentoring=mentoring,
        weighting=weighting,
        task_weight=task_weight,
        rank_decimals=rank_decimals,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        mentor_weight=mentor_weight,
        reduction=reduction,
    )
    loss, grad, report = fused_loss_and_grad(
        student_logits,
        mentor_logits,
        targets,
        LossWeights(of_mentors, class_weight, row_weight),
        scale,
        options,
        return_report,
        process_group,
    )
    return (loss, grad) if report is None else (loss, grad, report)


def fused_loss(
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    weights: LossWeights,
    options: LossOptions,
    return_report: bool | Literal["rows"],
    process_group: ProcessGroup | None,
) -> tuple[Tensor, ClassroomReport | RowReport | None]:
    """`fused_classroom_loss` with its options in one object and its weights in another."""
    batch = student_logits, mentor_logits, targets
    with_means = return_report is True
    call = "loss", *batch, weights, None, options, return_report, _INTERPRET
    if plan := plans.find(*call):
        return plan.loss(*batch, weights.mentor, options, with_means, process_group)
    rows = as_rows(*batch, weights, options)
    report: ClassroomReport | RowReport | None
    served = fused_pass_serves(rows.student, rows.mentors)
    if served:
        loss, report = _fused_loss_of_rows(rows, weights.mentor, options, with_means, process_group)
    else:
        loss, report = loss_by_definition(
            *rows.flat()[:4], weights.mentor, options, with_means, process_group
        )
    if return_report == "rows":
        report = row_report(rows, options, process_group)
    elif served:
        plans.keep(*functions(student_logits.device.type), *call)
    return loss.reshape(rows.shape) if options.reduction == "none" else loss, report


def _fused_loss_of_rows(
    rows: Rows,
    mentor_weight: Tensor | None,
    options: LossOptions,
    return_report: bool,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, ClassroomReport | None]:
    """`loss_by_definition` through the operators."""
    with_grad = rows.student.requires_grad and torch.is_grad_enabled()
    tensors = _kernel_inputs(rows, mentor_weight, options, process_group)
    loss, _, _, report = operators.loss(*tensors, with_grad, return_report, *options.flat())
    return loss, unpack_report(report, len(rows.mentors)) if return_report else None


def fused_loss_and_grad(
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    weights: LossWeights,
    scale: Tensor | None,
    options: LossOptions,
    return_report: bool | Literal["rows"],
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, ClassroomReport | RowReport | None]:
    """`fused_classroom_loss_and_grad`, likewise."""
    if options.reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum' where the gradient is returned")
    batch = student_logits, mentor_logits, targets
    with_means = return_report is True
    call = "loss_and_grad", *batch, weights, scale, options, return_report, _INTERPRET
    if plan := plans.find(*call):
        return plan.loss_and_grad(*batch, weights.mentor, scale, options, with_means, process_group)
    if isinstance(student_logits, Tensor):
        student_logits = student_logits.detach()
    rows = as_rows(student_logits, mentor_logits, targets, weights, options)
    if scale is not None:
        _check_scale(scale, student_logits)
        scale = _constant(scale)
    n_mentors = len(rows.mentors)
    report: ClassroomReport | RowReport | None
    served = fused_pass_serves(rows.student, rows.mentors)
    if served:
        loss, grad, means = _fused_loss_and_grad_of_rows(
            rows, weights.mentor, scale, options, with_means, process_group
        )
        report = unpack_report(means, n_mentors) if with_means else None
    elif torch.compiler.is_compiling():  # whose graphs cannot hold torch.autograd.grad
        loss, grad, means = operators.definition_and_grad(
            *rows.flat()[:4], weights.mentor, scale, with_means, *options.flat()
        )
        report = unpack_report(means, n_mentors) if with_means else None
    else:
        loss, grad, report = loss_and_grad_by_definition(
            *rows.flat()[:4], weights.mentor, scale, options, with_means, process_group
        )
    if return_report == "rows":
        report = row_report(rows, options, process_group)
    elif served:
        plans.keep(*functions(student_logits.device.type), *call)
    return loss, _like_logits(grad, rows.shape), report


def _fused_loss_and_grad_of_rows(
    rows: Rows,
    mentor_weight: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    return_report: bool,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, and the report's vector."""
    tensors = _kernel_inputs(rows, mentor_weight, options, process_group)
    return operators.loss_and_grad(*tensors, scale, return_report, *options.flat())


def _like_logits(grad: Tensor, shape: torch.Size) -> Tensor:
    """A gradient [N, C] or [B, C, P] as [B, C, d₁, …], a view; ``shape`` is [B, d₁, …]."""
    if grad.dim() == 3:
        return grad.unflatten(2, shape[1:])
    return grad if len(shape) == 1 else grad.reshape(*shape, grad.shape[1]).movedim(-1, 1)


def _check_scale(scale: Tensor, student_logits: Tensor) -> None:
    if not (isinstance(scale, Tensor) and scale.numel() == 1):
        raise ValueError(f"scale must be a tensor of one number, got {scale!r}")
    check_float("scale", scale)
    if scale.device != student_logits.device:
        raise ValueError(
            f"scale must be on the student's device {student_logits.device}, got {scale.device}"
        )


def _kernel_inputs(
    rows: Rows,
    mentor_weight: Tensor | None,
    options: LossOptions,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors that both operators take first; the last is the sums of ℓ for ranking "batch"."""
    student = rows.student
    mentors = [_constant(mentor) for mentor in rows.mentors]
    targets = _constant(rows.targets)
    ell_sums = None
    if options.ranking == "batch":
        ell_sums = operators.confidence_sums(student.detach(), mentors, targets, *options.flat())
        if process_group is not None:
            torch.distributed.all_reduce(ell_sums, group=process_group)
    if mentor_weight is not None:
        mentor_weight = _constant(mentor_weight)
    return student, mentors, targets, rows.weight, mentor_weight, ell_sums


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def implementation(device_type: str) -> ModuleType:
    """The module with the functions behind the operators: the kernels' launch, or the CPU's."""
    if device_type == "cpu" and not _INTERPRET:
        from classroomkd.loss import cpu_pass

        return cpu_pass
    from classroomkd.kernels import launch

    return launch


def functions(device_type: str) -> tuple[Any, int]:
    """`implementation` for calls of one kind, and up to how many elements addresses matter."""
    if device_type == "cpu" and not _INTERPRET:
        return implementation(device_type), 1
    from classroomkd.kernels.layout import MAX_ALIGNMENT
    from classroomkd.kernels.repeated import Launches

    return Launches(), MAX_ALIGNMENT


def fused_pass_serves(student: Tensor, mentors: list[Tensor]) -> bool:
    """Whether the operators take these logits; an error where kernels run that do not."""
    device_type = student.device.type
    if device_type == "cpu" and not _INTERPRET:
        return _numba_is_usable() and all(
            logits.dtype in KERNEL_LOGITS for logits in (student, *mentors)
        )
    if not _use_kernels(device_type):
        return False
    _check_kernel_limits(student, mentors)
    return True


def _use_kernels(device_type: str) -> bool:
    if device_type == "cpu":
        return _INTERPRET
    return device_type == "cuda" and _triton_is_usable()


def _numba_is_usable() -> bool:
    if not _NUMBA:
        warnings.warn(
            "numba is not installed; fused_classroom_loss computes classroom_loss in plain PyTorch",
            stacklevel=5,
        )
    return _NUMBA


# Why the kernels cannot run, once that was looked up; not functools.cache, of which torch.compile
# warns.
_obstacles: list[str | None] = []


def _triton_is_usable() -> bool:
    if not _obstacles:
        _obstacles.append(triton_obstacle(3, 3))
    if _obstacles[0] is None:
        return True
    warnings.warn(
        f"{_obstacles[0]}; fused_classroom_loss computes classroom_loss in plain PyTorch",
        stacklevel=5,
    )
    return False


def _check_kernel_limits(student_logits: Tensor, mentors: list[Tensor]) -> None:
    from classroomkd.kernels.launch import MAX_CLASSES, MAX_MENTORS

    for index, logits in enumerate((student_logits, *mentors)):
        if logits.dtype not in KERNEL_LOGITS:
            name = f"mentor_logits[{index - 1}]" if index else "student_logits"
            raise TypeError(
                f"{name} must be {either(KERNEL_LOGITS)} for the kernels, got {logits.dtype}; "
                "classroom_loss takes it"
            )
    if len(mentors) > MAX_MENTORS:
        raise ValueError(
            f"mentor_logits must hold at most {MAX_MENTORS} mentors for the kernels, got "
            f"{len(mentors)}; classroom_loss takes any number"
        )
    n_classes = student_logits.shape[1]
    if n_classes > MAX_CLASSES:
        raise ValueError(
            f"student_logits must have at most {MAX_CLASSES:,} classes for the kernels, got "
            f"{n_classes:,}; classroom_loss takes any number"
        )
