"""The fused pass as PyTorch operators: ``torch.ops.classroomkd``.

torch.compile, export and fake tensors see each as one opaque node. ``loss`` computes the gradient
of each row's loss beside the loss, and its backward only multiplies it by the incoming gradient;
``loss_and_grad`` is the same pass, which also scales the gradient, without autograd.

They are registered through PyTorch's `Library`; its `custom_op` would take fewer lines, but costs
several times the host time of a call, more than the launch itself.

The loss's options come last, one argument each: `LossOptions.flat`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library

from classroomkd.kernels.layout import new_gradient
from classroomkd.kernels.report_layout import report_size
from classroomkd.loss.classroom_report import pack_report
from classroomkd.loss.definition import loss_and_grad_by_definition
from classroomkd.loss.derivative import final
from classroomkd.loss.options import OPERATOR_SCHEMA, LossOptions, named

_library = library.Library("classroomkd", "DEF")


def register(
    schema: str,
    function: Callable[..., object],
    fake: Callable[..., object],
    autograd: Callable[..., object] | None = None,
) -> Callable[..., Any]:
    """Define an operator with this schema, which ``function`` runs on CPU and GPU.

    Returns a function that calls it; through PyTorch's dispatcher only where something else than
    autograd looks on, since the dispatcher takes longer than all else that a call does on the host.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")
    library.register_fake(f"classroomkd::{name}", fake, lib=_library)
    operator: Callable[..., Any] = getattr(torch.ops.classroomkd, name).default
    eager = autograd or function

    def call(*arguments: Any) -> Any:
        return (eager if _is_eager(arguments) else operator)(*arguments)

    return call


PLAIN = {Tensor, torch.nn.Parameter}
"""The types of tensors that are not made to replace PyTorch's own."""


def is_watched() -> bool:
    """Whether something may trace or transform calls: torch.compile, functorch or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _is_eager(arguments: Sequence[Any]) -> bool:
    """Whether nothing traces, transforms or replaces a call: no mode and no subclass of Tensor."""
    if is_watched():
        return False
    for argument in arguments:
        if isinstance(argument, list):
            if not all(type(each) in PLAIN for each in argument):
                return False
        elif isinstance(argument, Tensor) and type(argument) not in PLAIN:
            return False
    return True


@functools.cache
def _chooser() -> Any:
    from classroomkd.loss import fused  # which imports this module

    return fused


def _implementation(tensor: Tensor) -> Any:
    """The module that computes the pass for tensors on this one's device."""
    return _chooser().implementation(tensor.device.type)


@functools.lru_cache(typed=True)
def _options(*flat: Any) -> LossOptions:
    return LossOptions.of_flat(flat)


def _confidence_sums(
    student: Tensor,  # [N, C] or [B, C, P], N = B · P
    mentors: Sequence[Tensor],  # M of the same shape
    targets: Tensor,  # [N], or the same shape
    *flat: Any,
) -> Tensor:
    """float32 [M + 2]: Σ_b ℓ_k over the valid rows, the student's first, and their number."""
    return _implementation(student).confidence_sums(student, mentors, targets, _options(*flat))


def _confidence_sums_fake(student: Tensor, mentors: Sequence[Tensor], *_: Any) -> Tensor:
    return student.new_empty(len(mentors) + 2, dtype=torch.float32)


def _loss(
    student: Tensor,  # [N, C] or [B, C, P], N = B · P
    mentors: Sequence[Tensor],  # M of the same shape
    targets: Tensor,  # [N], or the same shape
    row_weight: Tensor | None,  # [N]
    mentor_weight: Tensor | None,  # [M]
    ell_sums: Tensor | None,  # [M + 2], for ranking "batch"
    with_grad: bool,
    with_report: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, each row's own gradient, what a mean is divided by, report; empty where not wanted."""
    outputs = _implementation(student).classroom_loss_and_grad(
        student,
        mentors,
        targets,
        row_weight,
        mentor_weight,
        ell_sums,
        _options(*flat),
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


def _loss_fake(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    with_grad: bool,
    with_report: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = named(flat)["reduction"] != "none"
    new = functools.partial(student.new_empty, dtype=torch.float32)
    return (
        new(() if summed else student.numel() // student.shape[1]),
        new_gradient(student) if with_grad else student.new_empty(0),
        new(() if summed or with_report else 0),
        new(report_size(len(mentors)) if with_report else 0),
    )


class _Loss(torch.autograd.Function):
    """A loss that was computed together with its gradient, as a function of the student."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        outputs: tuple[Tensor, Tensor, Tensor | None],
        row_weight: Tensor | None,
        reduction: str,
        scale: Callable[..., Tensor],
    ) -> Tensor:
        loss, grad, count = outputs
        ctx.scale = scale
        ctx.save_for_backward(student, grad, row_weight, count if reduction == "mean" else None)
        return loss

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> Any:
        student, grad, row_weight, count = ctx.saved_tensors
        scale = ctx.scale if _is_eager((loss_grad,)) else scale_rows
        if loss_grad.requires_grad:  # under create_graph
            loss_grad = loss_grad.detach()
        grad = scale(grad, loss_grad, row_weight, count)
        return final(grad, student), None, None, None, None


def differentiable(
    student: Tensor, outputs: Any, reduction: str, scale: Callable[..., Tensor]
) -> Tensor:
    """The loss of unweighted rows among these outputs, whose derivatives are there too.

    ``scale`` computes `scale_rows`.
    """
    numbers = outputs.loss, outputs.grad, outputs.count
    loss: Tensor = _Loss.apply(student, numbers, None, reduction, scale)
    return loss


def _loss_below_autograd(*arguments: Any) -> Any:
    if _is_eager(arguments):
        return _loss(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.classroomkd.loss.default(*arguments)


def _loss_autograd(*arguments: Any) -> Any:
    outputs = _loss_below_autograd(*arguments)
    if not arguments[_N_LOSS_INPUTS - 2]:  # with_grad
        return outputs
    reduction = named(arguments[_N_LOSS_INPUTS:])["reduction"]
    student, row_weight = arguments[0], arguments[3]
    loss = _Loss.apply(student, outputs[:3], row_weight, reduction, scale_rows)
    return loss, *outputs[1:]


def _scale_rows(
    grad: Tensor,  # [N, C] or [B, C, P], N = B · P
    factor: Tensor,  # [] or [N]
    row_weight: Tensor | None,  # [N]
    count: Tensor | None,  # []
) -> Tensor:
    """grad · factor · row_weight / count, in the memory layout of grad."""
    return _implementation(grad).scale_rows(grad, factor, row_weight, count)


def _scale_rows_fake(
    grad: Tensor, factor: Tensor, row_weight: Tensor | None, count: Tensor | None
) -> Tensor:
    return torch.empty_like(grad)


def _loss_and_grad(
    student: Tensor,  # [N, C] or [B, C, P], N = B · P
    mentors: Sequence[Tensor],  # M of the same shape
    targets: Tensor,  # [N], or the same shape
    row_weight: Tensor | None,  # [N]
    mentor_weight: Tensor | None,  # [M]
    ell_sums: Tensor | None,  # [M + 2], for ranking "batch"
    scale: Tensor | None,  # one number, of any shape
    with_report: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient times the scale, report (empty where not wanted)."""
    outputs = _implementation(student).classroom_loss_and_grad(
        student,
        mentors,
        targets,
        row_weight,
        mentor_weight,
        ell_sums,
        _options(*flat),
        with_grad=True,
        with_report=with_report,
        scale_grad=True,
        scale=scale,
    )
    assert outputs.grad is not None
    report = outputs.report
    if report is None:
        report = student.new_empty(0, dtype=torch.float32)
    return outputs.loss, outputs.grad, report


def _loss_and_grad_fake(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    scale: Tensor | None,
    with_report: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    new = functools.partial(student.new_empty, dtype=torch.float32)
    report = new(report_size(len(mentors)) if with_report else 0)
    return new(()), new_gradient(student), report


@contextmanager
def autograd_below() -> Iterator[None]:
    """Autograd inside an operator, where it is off."""
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard():
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


def _definition_and_grad(
    student: Tensor,  # [B, C]
    mentors: Sequence[Tensor],  # M of [B, C]
    targets: Tensor,  # [B] or [B, C]
    row_weight: Tensor | None,  # [B]
    mentor_weight: Tensor | None,  # [M]
    scale: Tensor | None,  # one number, of any shape
    with_report: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_loss_and_grad` by definition, where no kernel can run."""
    with autograd_below():
        loss, grad, report = loss_and_grad_by_definition(
            student,
            [*mentors],
            targets,
            row_weight,
            mentor_weight,
            scale,
            _options(*flat),
            with_report,
        )
    return loss, grad, loss.new_empty(0) if report is None else pack_report(report)


def _definition_and_grad_fake(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
    mentor_weight: Tensor | None,
    scale: Tensor | None,
    with_report: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32
    for logits in (student, *mentors):
        dtype = torch.promote_types(dtype, logits.dtype)
    new = functools.partial(student.new_empty, dtype=dtype)
    report = new(report_size(len(mentors)) if with_report else 0)
    return new(()), student.new_empty(student.shape), report


_BATCH = "Tensor student, Tensor[] mentors, Tensor targets"
_GIVEN = f"{_BATCH}, Tensor? row_weight, Tensor? mentor_weight, Tensor? ell_sums"
_LOSS = f"{_GIVEN}, bool with_grad, bool with_report"
_N_LOSS_INPUTS = 1 + _LOSS.count(",")  # before the options

confidence_sums = register(
    f"confidence_sums({_BATCH}, {OPERATOR_SCHEMA}) -> Tensor",
    _confidence_sums,
    _confidence_sums_fake,
)
loss = register(
    f"loss({_LOSS}, {OPERATOR_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_autograd,
)
loss_and_grad = register(
    f"loss_and_grad({_GIVEN}, Tensor? scale, bool with_report, {OPERATOR_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
    _loss_and_grad,
    _loss_and_grad_fake,
)
definition_and_grad = register(
    f"definition_and_grad({_BATCH}, Tensor? row_weight, Tensor? mentor_weight, Tensor? scale, "
    f"bool with_report, {OPERATOR_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _definition_and_grad,
    _definition_and_grad_fake,
)
scale_rows = register(
    "scale_rows(Tensor grad, Tensor factor, Tensor? row_weight, Tensor? count) -> Tensor",
    _scale_rows,
    _scale_rows_fake,
)
