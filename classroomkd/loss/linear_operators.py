"""The operators behind `fused_linear_classroom_loss`: from hidden states to gradients, in chunks.

With G [R, V] the gradient of each row's loss at the student's logits z = h Wᵀ + b,

    ∂h = G W        ∂W = Gᵀ h        ∂b = Σ_rows G

so a chunk of rows adds its share to ∂W and ∂b, and its logits and G are forgotten. The factor of
the reduction and of the incoming gradient multiplies the sums in the backward pass. With reduction
"none" every row has a factor of its own, which is known in the backward pass only: there the chunks
are computed again.

As an operator, the loop over the chunks is one node to torch.compile, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from classroomkd.kernels.report_layout import report_size
from classroomkd.loss import fused, operators
from classroomkd.loss.classroom_report import pack_report, unpack_report
from classroomkd.loss.definition import confidence_and_correctness, loss_by_definition
from classroomkd.loss.definition import confidence_sums as confidence_sums_by_definition
from classroomkd.loss.derivative import final
from classroomkd.loss.options import OPERATOR_SCHEMA, LossOptions, named
from classroomkd.loss.targets import prepare_targets

_BATCH = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor[] mentor_tensors, int[] mentor_sizes, "
    "Tensor targets, Tensor? rows, int chunk_rows, ScalarType? dtype"
)
_LOSS = (
    f"{_BATCH}, Tensor? mentor_weight, Tensor? ell_sums, Tensor? row_grad, "
    "bool with_hidden_grad, bool with_weight_grad, bool with_bias_grad, bool with_report"
)
_N_BATCH, _N_LOSS = (1 + text.count(",") for text in (_BATCH, _LOSS))  # before the options


class _Chunk(NamedTuple):
    rows: slice | Tensor  # which rows of the inputs
    hidden: Tensor  # [R, H], the student's
    student: Tensor  # [R, V] logits
    mentors: list[Tensor]  # M of [R, V] logits
    targets: Tensor  # [R]


class _Batch:
    """What both operators take first, with its logits a chunk at a time."""

    def __init__(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        mentor_tensors: Sequence[Tensor],  # mentor by mentor: logits, or hidden, weight(, bias)
        mentor_sizes: Sequence[int],  # how many tensors each mentor has
        targets: Tensor,  # [N]
        rows: Tensor | None,  # which rows to compute; None: all
        chunk_rows: int,
        dtype: torch.dtype | None,  # of the products, under autocast
    ) -> None:
        self._hidden, self._targets, self._rows = hidden, targets, rows
        self._chunk_rows, self._dtype = chunk_rows, dtype
        self.weight = self._cast(weight)
        self._bias = None if bias is None else self._cast(bias)
        tensors = iter(mentor_tensors)
        self._mentors = [
            (next(tensors), [self._cast(next(tensors)) for _ in range(size - 1)])
            for size in mentor_sizes
        ]

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def chunks(self) -> Iterator[_Chunk]:
        n_rows = len(self._targets if self._rows is None else self._rows)
        for begin in range(0, n_rows, self._chunk_rows):
            rows: slice | Tensor = slice(begin, begin + self._chunk_rows)
            if self._rows is not None:
                rows = self._rows[rows]
            hidden = self._cast(self._hidden[rows])
            mentors = [
                linear(self._cast(first[rows]), *head) if head else first[rows]
                for first, head in self._mentors
            ]
            student = linear(hidden, self.weight, self._bias)
            yield _Chunk(rows, hidden, student, mentors, self._targets[rows])


def _precise(*arguments: Any) -> torch.dtype:
    """The dtype of losses and sums: float64 if any of the logits have it, else float32."""
    hidden, _, _, mentor_tensors, *_ = arguments
    doubles = (tensor.dtype == torch.float64 for tensor in (hidden, *mentor_tensors))
    return torch.float64 if any(doubles) else torch.float32


def _confidence_sums(*arguments: Any) -> Tensor:
    """`operators.confidence_sums` over all chunks, [M + 2]."""
    total = _confidence_sums_fake(*arguments).zero_()
    with torch.autocast(total.device.type, enabled=False):
        for chunk in _Batch(*arguments[:_N_BATCH]).chunks():
            total += _pass_confidence_sums(
                chunk.student, chunk.mentors, chunk.targets, *arguments[_N_BATCH:]
            )
    return total


def _confidence_sums_fake(*arguments: Any) -> Tensor:
    hidden, mentor_sizes = arguments[0], arguments[4]
    return hidden.new_empty(len(mentor_sizes) + 2, dtype=_precise(*arguments))


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    """Loss, valid rows; gradients at hidden, weight and bias, and report: empty where not wanted.

    The gradients are those of Σ_rows loss · ``row_grad`` (1 if None).
    """
    outputs = tuple(output.zero_() for output in _loss_fake(*arguments))
    loss, count, hidden_grad, weight_grad, bias_grad, report = outputs
    mentor_weight, ell_sums, row_grad, *wanted, with_report = arguments[_N_BATCH:_N_LOSS]
    n_mentors, all_targets = len(arguments[4]), arguments[5]
    options = named(arguments[_N_LOSS:])
    reduction, ignore_index = options["reduction"], options["ignore_index"]
    flat = tuple((options | {"reduction": "none" if reduction == "none" else "sum"}).values())
    batch, precise = _Batch(*arguments[:_N_BATCH]), loss.dtype
    count += (all_targets != ignore_index).sum().clamp_min(1)
    with torch.autocast(loss.device.type, enabled=False):
        for rows, hidden, student, mentors, targets in batch.chunks():
            row_loss, grad, means = _pass(
                student, mentors, targets, mentor_weight, ell_sums, any(wanted), with_report, *flat
            )
            del student, mentors
            if reduction == "none":
                loss[rows] = row_loss
            else:
                loss += row_loss
            valid = targets != ignore_index
            if with_report:
                report += _report_sums(means, n_mentors, valid.sum())
            if row_grad is not None:
                grad = (grad * row_grad[rows, None]).to(grad.dtype)
            if wanted[0]:
                hidden_grad[rows] = _product(grad, batch.weight, precise)
            if wanted[1]:
                # A row that does not count may hold anything, and 0 · NaN is NaN.
                hidden = torch.where(valid[:, None], hidden, 0)
                if grad.dtype == precise:
                    weight_grad.addmm_(grad.t(), hidden)
                else:
                    weight_grad += _product(grad.t(), hidden, precise)
            if wanted[2]:
                bias_grad += grad.sum(0, dtype=precise)
    if reduction == "mean":
        loss /= count
    if with_report:
        report.copy_(_report_means(report, n_mentors, count))
    return outputs


def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, _, _, mentor_sizes, *_ = arguments
    _, _, _, *wanted, with_report = arguments[_N_BATCH:_N_LOSS]
    summed = named(arguments[_N_LOSS:])["reduction"] != "none"
    new = partial(hidden.new_empty, dtype=_precise(*arguments))
    return (
        new(() if summed else hidden.shape[0]),
        new(()),
        new(hidden.shape if wanted[0] else 0),
        new(weight.shape if wanted[1] else 0),
        new(weight.shape[0] if wanted[2] else 0),
        new(report_size(len(mentor_sizes)) if with_report else 0),
    )


def _pass_confidence_sums(
    student: Tensor, mentors: list[Tensor], targets: Tensor, *flat: Any
) -> Tensor:
    """`operators.confidence_sums` of a chunk, by definition where no fused pass serves."""
    if fused.fused_pass_serves(student, mentors):
        sums: Tensor = operators.confidence_sums(student, mentors, targets, *flat)
        return sums
    dtype = reduce(torch.promote_types, (logits.dtype for logits in mentors), student.dtype)
    stacked = torch.stack([logits.to(dtype) for logits in (student, *mentors)])
    target = prepare_targets(targets, student.shape[1], LossOptions.of_flat(flat), dtype)
    ell, _ = confidence_and_correctness(torch.where(target.valid[:, None], stacked, 0), target)
    return confidence_sums_by_definition(ell, target.valid)


def _pass(
    student: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    with_grad: bool,
    with_report: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.loss` of a chunk, by definition where no fused pass serves: loss, grad, report."""
    if fused.fused_pass_serves(student, mentors):
        loss, grad, _, report = operators.loss(
            *(student, mentors, targets, None, mentor_weight, ell_sums),
            *(with_grad, with_report),
            *flat,
        )
        return loss, grad, report
    options = LossOptions.of_flat(flat)
    with operators.autograd_below(), torch.set_grad_enabled(with_grad):
        leaf = student.detach().requires_grad_(with_grad)
        loss, means = loss_by_definition(
            leaf, mentors, targets, None, mentor_weight, options, with_report, ell_sums=ell_sums
        )
        grad = torch.autograd.grad(loss.sum(), leaf)[0] if with_grad else leaf
    return loss.detach(), grad, leaf if means is None else pack_report(means)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in ``dtype`` and, where PyTorch can, rounded to nothing less on the way."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype) if _MIXED_PRODUCTS else (a @ b).to(dtype)
    return a.to(dtype) @ b.to(dtype)


def _report_sums(means: Tensor, n_mentors: int, n_valid: Tensor) -> Tensor:
    """A chunk's report as sums over rows, which can be added."""
    sums = unpack_report(means * n_valid, n_mentors)
    share = unpack_report(means, n_mentors).active_share
    return pack_report(sums._replace(kl=sums.kl * share))


def _report_means(sums: Tensor, n_mentors: int, n_valid: Tensor) -> Tensor:
    """The inverse of `_report_sums`."""
    means = unpack_report(sums / n_valid, n_mentors)
    taught = means.active_share > 0
    return pack_report(means._replace(kl=torch.where(taught, means.kl / means.active_share, 0)))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        hidden, weight, bias, mentor_tensors, *_ = arguments
        ctx.reduction = named(arguments[_N_LOSS:])["reduction"]
        ctx.n_inputs, ctx.n_mentor_tensors = len(arguments), len(mentor_tensors)
        forward = arguments
        if ctx.reduction == "none":
            forward = (*arguments[:_WANTED], False, False, False, *arguments[_WANTED + 3 :])
        outputs = _below_autograd(*forward)
        if ctx.reduction == "none":
            ctx.arguments = [None if isinstance(a, Tensor) else a for a in arguments]
            ctx.arguments[3] = None
            tensors = {i: a for i, a in enumerate(arguments) if isinstance(a, Tensor)}
            ctx.places = list(tensors)
            ctx.save_for_backward(*mentor_tensors, *tensors.values())
        else:
            ctx.save_for_backward(hidden, weight, bias, *outputs[1:5])
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> Any:
        loss_grad = loss_grad.detach()
        if ctx.reduction == "none":
            arguments = [*ctx.arguments]
            arguments[3] = [*ctx.saved_tensors[: ctx.n_mentor_tensors]]
            for place, tensor in zip(
                ctx.places, ctx.saved_tensors[ctx.n_mentor_tensors :], strict=True
            ):
                arguments[place] = tensor
            arguments[_ROW_GRAD] = loss_grad
            inputs, (_, _, *grads, _), factor = arguments[:3], _below_autograd(*arguments), None
        else:
            *inputs, count, hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
            grads = hidden_grad, weight_grad, bias_grad
            factor = loss_grad / count if ctx.reduction == "mean" else loss_grad
        wanted = [
            None
            if tensor is None or grad.shape != tensor.shape
            else final((grad if factor is None else grad * factor).to(tensor.dtype), tensor)
            for tensor, grad in zip(inputs, grads, strict=True)
        ]
        return *wanted, *[None] * (ctx.n_inputs - 3)


def _below_autograd(*arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return loss(*arguments)


def _loss_autograd(*arguments: Any) -> Any:
    with_grad = any(arguments[_WANTED : _WANTED + 3])
    return _LinearLoss.apply(*arguments) if with_grad else _below_autograd(*arguments)


_MIXED_PRODUCTS = "out_dtype" in (torch.mm.__doc__ or "")  # since torch 2.8
_ROW_GRAD = _N_BATCH + 2
_WANTED = _N_BATCH + 3  # the first of the three flags

confidence_sums = operators.register(
    f"linear_confidence_sums({_BATCH}, {OPERATOR_SCHEMA}) -> Tensor",
    _confidence_sums,
    _confidence_sums_fake,
)
loss = operators.register(
    f"linear_loss({_LOSS}, {OPERATOR_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_autograd,
)
