"""The kernels as operators of PyTorch: ``torch.ops.classroomkd``.

torch.compile, export and fake tensors see each as one opaque node. ``loss`` computes the gradient
of each row's loss beside the loss, and its backward only multiplies it by what arrives from above;
``loss_and_grad`` is the same pass with the gradient finished, and no autograd.

They are registered through PyTorch's `Library`; its `custom_op` says the same in fewer words and
costs several times the host time a call, more than the launch itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, library

from classroomkd.loss.definition import loss_and_grad_by_definition
from classroomkd.loss.derivative import final
from classroomkd.loss.options import AUTOMATIC, LossOptions

_library = library.Library("classroomkd", "DEF")


def _register(
    name: str, function: Callable[..., object], fake: Callable[..., object]
) -> Callable[..., object]:
    """Define an operator with the signature of ``function``, which runs it on CPU and GPU."""
    _library.define(name + library.infer_schema(function, mutates_args=()))
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    library.register_fake(f"classroomkd::{name}", fake, lib=_library)
    return getattr(torch.ops.classroomkd, name).default


def _confidence_sums(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    from classroomkd.kernels import launch

    return launch.confidence_sums(
        student, mentors, targets, label_smoothing=label_smoothing, ignore_index=ignore_index
    )


def _confidence_sums_fake(student, mentors, *_):
    return student.new_empty(len(mentors) + 2, dtype=torch.float32)


def _loss(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    temperature: float,
    knowledge_filter: str,
    mentoring: str,
    weighting: str,
    mentors_weight: float,
    task_weight: float | None,
    rank_decimals: int | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
    with_report: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, the rows' own gradients, number of valid rows, report; empty where not wanted."""
    from classroomkd.kernels import launch

    outputs = launch.classroom_loss_and_grad(
        student,
        mentors,
        targets,
        mentor_weight,
        ell_sums,
        temperature=temperature,
        knowledge_filter=knowledge_filter,
        mentoring=mentoring,
        weighting=weighting,
        mentors_weight=mentors_weight,
        task_weight=task_weight,
        rank_decimals=rank_decimals,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        with_grad=with_grad,
        with_report=with_report,
    )
    nothing = functools.partial(student.new_empty, 0)
    return (
        outputs.loss,
        nothing() if outputs.grad is None else outputs.grad,
        nothing(dtype=torch.float32) if outputs.count is None else outputs.count,
        nothing(dtype=torch.float32) if outputs.report is None else outputs.report,
    )


def _loss_fake(student, mentors, *arguments):
    reduction, with_grad, with_report = arguments[-3:]
    summed = reduction != "none"
    new = functools.partial(student.new_empty, dtype=torch.float32)
    return (
        new(() if summed else student.shape[0]),
        student.new_empty(student.shape if with_grad else 0),
        new(() if summed or with_report else 0),
        new(4 * len(mentors) + 2 if with_report else 0),
    )


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, mentors, *arguments):
        outputs = _loss_below_autograd(student, mentors, *arguments)
        _, grad, count, _ = outputs
        ctx.n_inputs = 2 + len(arguments)
        ctx.mean = arguments[-3] == "mean"
        ctx.save_for_backward(student, grad, count)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, loss_grad, *_):
        student, grad, count = ctx.saved_tensors
        grad = scale_rows(grad, loss_grad.detach(), count if ctx.mean else None)
        return final(grad, student), *[None] * (ctx.n_inputs - 1)


def _loss_below_autograd(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return loss(*arguments)


def _loss_autograd(*arguments):
    with_grad = arguments[-2]
    return _Loss.apply(*arguments) if with_grad else _loss_below_autograd(*arguments)


def _scale_rows(grad: Tensor, factor: Tensor, count: Tensor | None) -> Tensor:
    from classroomkd.kernels import launch

    return launch.scale_rows(grad, factor, count)


def _scale_rows_fake(grad, factor, count):
    return torch.empty_like(grad)


def _loss_and_grad(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    temperature: float,
    knowledge_filter: str,
    mentoring: str,
    weighting: str,
    mentors_weight: float,
    task_weight: float | None,
    rank_decimals: int | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    scale: Tensor | None,
    with_report: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its finished gradient, report (empty where not wanted)."""
    from classroomkd.kernels import launch

    outputs = launch.classroom_loss_and_grad(
        student,
        mentors,
        targets,
        mentor_weight,
        ell_sums,
        temperature=temperature,
        knowledge_filter=knowledge_filter,
        mentoring=mentoring,
        weighting=weighting,
        mentors_weight=mentors_weight,
        task_weight=task_weight,
        rank_decimals=rank_decimals,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        with_grad=True,
        with_report=with_report,
        finished_grad=True,
        scale=scale,
    )
    report = outputs.report
    if report is None:
        report = student.new_empty(0, dtype=torch.float32)
    return outputs.loss, outputs.grad, report


def _loss_and_grad_fake(student, mentors, *arguments):
    new = functools.partial(student.new_empty, dtype=torch.float32)
    report = new(4 * len(mentors) + 2 if arguments[-1] else 0)
    return new(()), student.new_empty(student.shape), report


def _definition_and_grad(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    scale: Tensor | None,
    temperature: float,
    ranking: str,
    knowledge_filter: str,
    mentoring: str,
    weighting: str,
    task_weight: str,
    rank_decimals: int | None,
    label_smoothing: float,
    ignore_index: int,
    mentor_weight_for_all: str | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and report by definition, where no kernel serves."""
    options = LossOptions(
        temperature=temperature,
        ranking=ranking,
        knowledge_filter=knowledge_filter,
        mentoring=mentoring,
        weighting=weighting,
        task_weight=task_weight if task_weight == "confidence" else float(task_weight),
        rank_decimals=rank_decimals,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        mentor_weight=(
            mentor_weight_for_all
            if mentor_weight_for_all in (None, AUTOMATIC)
            else float(mentor_weight_for_all)
        ),
        reduction=reduction,
    )
    # Below an operator autograd is off, and it is autograd that the gradient comes from.
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard():
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        loss, grad, report = loss_and_grad_by_definition(
            student, [*mentors], targets, mentor_weight, scale, options
        )
    return loss, grad, torch.cat([values.reshape(-1) for values in report])


def _definition_and_grad_fake(student, mentors, *_):
    dtype = torch.float32
    for logits in (student, *mentors):
        dtype = torch.promote_types(dtype, logits.dtype)
    new = functools.partial(student.new_empty, dtype=dtype)
    return new(()), student.new_empty(student.shape), new(4 * len(mentors) + 2)


confidence_sums = _register("confidence_sums", _confidence_sums, _confidence_sums_fake)
loss = _register("loss", _loss, _loss_fake)
_library.impl("loss", _loss_autograd, "Autograd")
loss_and_grad = _register("loss_and_grad", _loss_and_grad, _loss_and_grad_fake)
definition_and_grad = _register(
    "definition_and_grad", _definition_and_grad, _definition_and_grad_fake
)
scale_rows = _register("scale_rows", _scale_rows, _scale_rows_fake)
