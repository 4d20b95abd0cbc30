"""The loss through the Triton kernels: one pass for the loss and its gradient.

Arguments are checked here, and the path is chosen; ``operators.py`` holds the operators.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from classroomkd.kernels import triton_obstacle
from classroomkd.loss import operators
from classroomkd.loss.definition import loss_and_grad_by_definition, loss_by_definition
from classroomkd.loss.inputs import check_inputs, split_mentor_weight
from classroomkd.loss.options import LossOptions
from classroomkd.loss.report import ClassroomReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Triton decides when a kernel is defined whether it will be interpreted; so does this.
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    reduction: str = "mean",
    process_group: ProcessGroup | None = None,
    return_report: bool = False,
) -> Tensor | tuple[Tensor, ClassroomReport]:
    """ClassroomKD's multi-mentor distillation loss, fused.

    Takes and returns what `classroomkd.classroom_loss` does, and means the same; on CUDA and ROCm
    tensors it runs one Triton kernel (two for ranking "batch") instead of some hundred PyTorch
    ones, in float32 arithmetic, and never waits for the GPU. Elsewhere, or where Triton (3.3 or
    newer) is missing, it is `classroom_loss` itself. With the environment variable
    ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, slowly, in Triton's interpreter.

    Args:
        student_logits: [B, C], float16, bfloat16 or float32. The gradient has its dtype.
        mentor_logits: [M, B, C], or a sequence of M tensors [B, C], which are read where they lie;
            1 ≤ M ≤ 16, dtypes may be mixed, rows may have any stride.
        targets: class indices [B], or class probabilities [B, C].
        temperature, ranking, knowledge_filter, mentoring, weighting, task_weight, rank_decimals,
            label_smoothing, ignore_index, mentor_weight, reduction, process_group: see
            `classroom_loss`.
        return_report: also return a `ClassroomReport`, at the cost of [4M + 3, B] floats.

    Returns:
        The loss, 0-d, or [B] with ``reduction="none"``, float32; with ``return_report`` the pair
        (loss, report). A second derivative raises RuntimeError.

    Raises:
        ValueError, TypeError: as `classroom_loss`; on a GPU also for float64 logits and for more
            mentors or classes than the kernels take. A class index out of range makes its row NaN
            there, since looking would mean waiting for the GPU.

    """
    weight_tensor, mentor_weight = split_mentor_weight(mentor_weight)
    options = LossOptions(
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
    mentors = check_inputs(student_logits, mentor_logits, targets, weight_tensor)
    if not _use_kernels(student_logits.device.type):
        return loss_by_definition(
            student_logits,
            mentors,
            targets,
            weight_tensor,
            options,
            return_report,
            process_group,
        )
    _check_kernel_limits(student_logits, mentors)
    arguments = _kernel_arguments(
        student_logits, mentors, targets, weight_tensor, options, process_group
    )
    loss, _, _, report = operators.loss(
        *arguments,
        options.reduction,
        student_logits.requires_grad and torch.is_grad_enabled(),
        return_report,
    )
    return (loss, _report(report, len(mentors))) if return_report else loss


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
    reduction: str = "mean",
    scale: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    return_report: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ClassroomReport]:
    """`fused_classroom_loss` and its gradient together, for trainers: one launch, no autograd.

        loss, grad = fused_classroom_loss_and_grad(logits.detach(), mentor_logits, targets)
        logits.backward(grad)

    saves autograd's second pass over the gradient. With ranking "batch" there are two launches;
    with more than 1024 rows and the mean, PyTorch counts the valid ones first.

    Args:
        student_logits, mentor_logits, targets: see `fused_classroom_loss`.
        temperature, ranking, knowledge_filter, mentoring, weighting, task_weight, rank_decimals,
            label_smoothing, ignore_index, mentor_weight, process_group: see `classroom_loss`.
        reduction: "mean" or "sum".
        scale: a tensor of one number on the logits' device (a gradient scaler's, say) that
            multiplies the gradient, not the loss, before it is rounded to the student's dtype.
        return_report: also return a `ClassroomReport`.

    Returns:
        (loss, gradient) or (loss, gradient, report): the loss 0-d float32, the gradient [B, C]
        in the student's dtype; neither has an autograd graph.

    Raises:
        ValueError, TypeError: as `fused_classroom_loss`; also for ``reduction="none"`` and a
            ``scale`` that is not one number.

    """
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum' where the gradient is returned")
    weight_tensor, mentor_weight = split_mentor_weight(mentor_weight)
    options = LossOptions(
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
    mentors = check_inputs(student_logits, mentor_logits, targets, weight_tensor)
    if scale is not None:
        _check_scale(scale, student_logits)
    student_logits = student_logits.detach()
    if not _use_kernels(student_logits.device.type):
        arguments = (student_logits, mentors, targets, weight_tensor, scale)
        if torch.compiler.is_compiling():  # whose graphs have no torch.autograd.grad in them
            loss, grad, means = operators.definition_and_grad(*arguments, *_flat(options))
            report = _report(means, len(mentors))
        else:
            loss, grad, report = loss_and_grad_by_definition(*arguments, options, process_group)
        return (loss, grad, report) if return_report else (loss, grad)
    _check_kernel_limits(student_logits, mentors)
    arguments = _kernel_arguments(
        student_logits, mentors, targets, weight_tensor, options, process_group
    )
    loss, grad, report = operators.loss_and_grad(
        *arguments, reduction, None if scale is None else _constant(scale), return_report
    )
    if return_report:
        return loss, grad, _report(report, len(mentors))
    return loss, grad


def _check_scale(scale: Tensor, student_logits: Tensor) -> None:
    if not (isinstance(scale, Tensor) and scale.numel() == 1):
        raise ValueError(f"scale must be a tensor of one number, got {scale!r}")
    if scale.device != student_logits.device:
        raise ValueError(
            f"scale must be on the student's device {student_logits.device}, got {scale.device}"
        )


def _kernel_arguments(
    student: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    options: LossOptions,
    process_group: ProcessGroup | None,
) -> tuple[object, ...]:
    """What both operators take first; for ranking "batch" with the sums of the log-confidences."""
    mentors = [_constant(mentor) for mentor in mentors]
    targets = _constant(targets)
    ell_sums = None
    if options.ranking == "batch":
        ell_sums = operators.confidence_sums(
            student.detach(), mentors, targets, options.label_smoothing, options.ignore_index
        )
        if process_group is not None:
            torch.distributed.all_reduce(ell_sums, group=process_group)
    return (
        student,
        mentors,
        targets,
        None if mentor_weight is None else _constant(mentor_weight),
        ell_sums,
        options.temperature,
        options.knowledge_filter,
        options.mentoring,
        options.weighting,
        options.weight_of_mentors(student.shape[1], len(mentors)),
        None if options.task_weight == "confidence" else options.task_weight,
        options.rank_decimals,
        options.label_smoothing,
        options.ignore_index,
    )


def _flat(options: LossOptions) -> tuple[object, ...]:
    """The options in order, in types that an operator's arguments can have."""
    values = vars(options)
    texts = {"task_weight": str(values["task_weight"])}
    if (weight := values["mentor_weight"]) is not None:
        texts["mentor_weight"] = str(weight)
    return tuple((values | texts).values())


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _report(means: Tensor, n_mentors: int) -> ClassroomReport:
    *per_mentor, rest = means.split([n_mentors] * 4 + [2])
    return ClassroomReport(*per_mentor, rest[0], rest[1])


def _use_kernels(device_type: str) -> bool:
    if device_type == "cpu":
        return _INTERPRET
    return device_type == "cuda" and _triton_serves()


# What keeps the kernels from running, once somebody has looked; not functools.cache, which
# torch.compile sees through with a warning.
_obstacles: list[str | None] = []


def _triton_serves() -> bool:
    if not _obstacles:
        _obstacles.append(triton_obstacle(3, 3))
    if _obstacles[0] is None:
        return True
    warnings.warn(
        f"{_obstacles[0]}; fused_classroom_loss computes classroom_loss in plain PyTorch",
        stacklevel=4,
    )
    return False


def _check_kernel_limits(student_logits: Tensor, mentors: list[Tensor]) -> None:
    from classroomkd.kernels.launch import MAX_CLASSES, MAX_MENTORS

    for index, logits in enumerate((student_logits, *mentors)):
        if logits.dtype not in _KERNEL_DTYPES:
            name = f"mentor_logits[{index - 1}]" if index else "student_logits"
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16 for the kernels, got "
                f"{logits.dtype}; classroom_loss takes it"
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
