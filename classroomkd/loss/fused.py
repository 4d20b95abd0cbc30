"""The loss through the Triton kernels: one pass for the loss and its gradient.

The pass is the operator ``torch.ops.classroomkd.row_loss``, so that torch.compile, autocast and
export see one opaque node. It computes the gradient of each row's loss beside the loss; backward
only multiplies it by what arrives from above.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from classroomkd.loss.definition import loss_by_definition
from classroomkd.loss.options import LossOptions, check_inputs
from classroomkd.loss.report import ClassroomReport

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
    mentor_weight: Tensor | None = None,
    reduction: str = "mean",
    return_report: bool = False,
) -> Tensor | tuple[Tensor, ClassroomReport]:
    """ClassroomKD's multi-mentor distillation loss, fused.

    Takes and returns what `classroomkd.classroom_loss` does, and means the same; on CUDA and ROCm
    tensors it runs one Triton kernel instead of some hundred PyTorch ones, in float32 arithmetic,
    and never waits for the GPU. Elsewhere, or where Triton (3.3 or newer) is missing, it is
    `classroom_loss` itself. With the environment variable ``TRITON_INTERPRET=1`` the kernels run
    on CPU tensors, slowly, in Triton's interpreter.

    Args:
        student_logits: [B, C], float16, bfloat16 or float32. The gradient has its dtype.
        mentor_logits: [M, B, C], or a sequence of M tensors [B, C], which are read where they lie;
            1 ≤ M ≤ 16, dtypes may be mixed, rows may have any stride.
        targets: class indices [B], or class probabilities [B, C].
        temperature, ranking, knowledge_filter, mentoring, weighting, task_weight, rank_decimals,
            label_smoothing, ignore_index, mentor_weight, reduction: see `classroom_loss`.
        return_report: also return a `ClassroomReport`, at the cost of [4M + 2, B] floats.

    Returns:
        The loss, 0-d, or [B] with ``reduction="none"``, float32; with ``return_report`` the pair
        (loss, report). A second derivative raises RuntimeError.

    Raises:
        ValueError, TypeError: as `classroom_loss`; on a GPU also for float64 logits and for more
            mentors or classes than the kernels take. A class index out of range makes its row NaN
            there, since looking would mean waiting for the GPU.

    """
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
        reduction=reduction,
    )
    mentors = check_inputs(student_logits, mentor_logits, targets, mentor_weight)
    if not _use_kernels(student_logits.device.type):
        return loss_by_definition(
            student_logits, mentors, targets, mentor_weight, options, return_report
        )
    _check_kernel_limits(student_logits, mentors)
    rows, _, statistics = torch.ops.classroomkd.row_loss(
        student_logits,
        [mentor.detach() for mentor in mentors],
        targets.detach(),
        None if mentor_weight is None else mentor_weight.detach(),
        options.temperature,
        options.ranking,
        options.knowledge_filter,
        options.mentoring,
        options.weighting,
        None if options.task_weight == "confidence" else options.task_weight,
        options.rank_decimals,
        options.label_smoothing,
        options.ignore_index,
        student_logits.requires_grad and torch.is_grad_enabled(),
        return_report,
    )
    if options.reduction == "none":
        loss = rows
    elif options.reduction == "sum":
        loss = rows.sum()
    else:
        loss = rows.sum() / _n_valid(targets, options.ignore_index)
    if not return_report:
        return loss
    n_valid = _n_valid(targets, options.ignore_index)
    return loss, _report(statistics.detach(), len(mentors), n_valid)


def _n_valid(targets: Tensor, ignore_index: int) -> int | Tensor:
    if targets.dim() == 2:
        return max(targets.shape[0], 1)
    return (targets != ignore_index).sum().clamp_min(1)


def _report(statistics: Tensor, n_mentors: int, n_valid: int | Tensor) -> ClassroomReport:
    sums = statistics.sum(1)
    n_active, rank, temperature, kl, rest = sums.split([n_mentors] * 4 + [2])
    return ClassroomReport(
        active_share=n_active / n_valid,
        rank_weight=rank / n_valid,
        temperature=temperature / n_valid,
        kl=kl / n_active.clamp_min(1),
        student_confidence=rest[0] / n_valid,
        task_loss=rest[1] / n_valid,
    )


def _use_kernels(device_type: str) -> bool:
    if device_type == "cpu":
        return _INTERPRET
    return device_type == "cuda" and _triton_serves()


@functools.cache
def _triton_serves() -> bool:
    if importlib.util.find_spec("triton") is None:
        found = "Triton is not installed"
    else:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3):
            return True
        found = f"Triton {triton.__version__} is too old (kernels need 3.3, torch 2.7's)"
    warnings.warn(
        f"{found}; fused_classroom_loss computes classroom_loss in plain PyTorch", stacklevel=4
    )
    return False


def _check_kernel_limits(student_logits: Tensor, mentors: list[Tensor]) -> None:
    from classroomkd.kernels.launch import MAX_MENTORS, fits

    for name, logits in (
        ("student_logits", student_logits),
        *((f"mentor_logits[{index}]", mentor) for index, mentor in enumerate(mentors)),
    ):
        if logits.dtype not in _KERNEL_DTYPES:
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
    if not fits(n_classes, len(mentors)):
        raise ValueError(
            f"the kernels keep a row of student and mentors on the chip, and {n_classes} classes "
            f"with {len(mentors)} mentors do not fit; classroom_loss takes any number"
        )


@torch.library.custom_op("classroomkd::row_loss", mutates_args=())
def _row_loss(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    from classroomkd.kernels.launch import classroom_rows

    loss, grad, statistics = classroom_rows(
        student,
        mentors,
        targets,
        mentor_weight,
        temperature=temperature,
        ranking=ranking,
        knowledge_filter=knowledge_filter,
        mentoring=mentoring,
        weighting=weighting,
        task_weight=task_weight,
        rank_decimals=rank_decimals,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        with_grad=with_grad,
        with_statistics=with_statistics,
    )
    nothing = functools.partial(student.new_empty, 0)
    return (
        loss,
        nothing() if grad is None else grad,
        nothing(dtype=torch.float32) if statistics is None else statistics,
    )


@_row_loss.register_fake
def _(student, mentors, *arguments):
    with_grad, with_statistics = arguments[-2:]
    lines = 4 * len(mentors) + 2
    return (
        student.new_empty(student.shape[0], dtype=torch.float32),
        student.new_empty(student.shape if with_grad else 0),
        student.new_empty((lines, student.shape[0]) if with_statistics else 0, dtype=torch.float32),
    )


def _save_grad(ctx, inputs, output):
    ctx.n_mentors = len(inputs[1])
    ctx.n_others = len(inputs) - 2
    ctx.save_for_backward(output[1])


def _backward(ctx, loss_grad, _grad_grad, _statistics_grad):
    (grad,) = ctx.saved_tensors
    student_grad = torch.ops.classroomkd.scale_rows(grad, loss_grad)
    return student_grad, [None] * ctx.n_mentors, *[None] * ctx.n_others


_row_loss.register_autograd(_backward, setup_context=_save_grad)


@torch.library.custom_op("classroomkd::scale_rows", mutates_args=())
def _scale_rows(grad: Tensor, factor: Tensor) -> Tensor:
    from classroomkd.kernels.launch import scale_rows

    return scale_rows(grad, factor)


@_scale_rows.register_fake
def _(grad, factor):
    return torch.empty_like(grad)
