"""Calls like earlier ones, which need no checks and repeat their launches.

Whether a call is valid, and how it is run, depends on its options and on its tensors' types,
dtypes, devices, shapes, strides and alignment; on their values only for class indices on a CPU,
which every call looks at. All this is compared with those of earlier calls. PyTorch's own guard of
compiled code compares the tensors, in a fraction of the time that Python would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from classroomkd.loss import operators
from classroomkd.loss.classroom_report import ClassroomReport, unpack_report
from classroomkd.loss.options import LossOptions
from classroomkd.loss.rows import LossWeights

_MAX_KINDS = 256
_MAX_PLANS = 4
"""For one kind: calls that differ in strides, alignment, dtypes, devices or needed gradients."""


class Plan:
    """How calls with such tensors are run.

    ``functions`` are those of ``cpu_pass.py``, or the kernels' `Launches`; they depend on addresses
    up to a multiple of so many elements.
    """

    def __init__(self, tensors: Sequence[Tensor], functions: Any, elements: int) -> None:
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        sizes = [tensor.element_size() for tensor in tensors if tensor.is_floating_point()]
        self._bytes = elements * max(sizes)
        self._offsets = self._offsets_of(tensors)
        self._functions = functions

    def serves(self, tensors: Sequence[Any]) -> bool:
        """Whether these are such tensors."""
        return self._guards.check(*tensors) and self._offsets_of(tensors) == self._offsets

    def _offsets_of(self, tensors: Sequence[Tensor]) -> list[int]:
        n_bytes = self._bytes
        return [tensor.data_ptr() % n_bytes for tensor in tensors]

    def loss(
        self,
        student: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        mentor_weight: Tensor | None,
        options: LossOptions,
        with_report: bool,
        process_group: Any,
    ) -> tuple[Tensor, ClassroomReport | None]:
        """`fused_classroom_loss`, and its report if that is wanted."""
        mentors, *more = self._more(student, mentor_logits, targets, options, process_group)
        with_grad = _with_grad(student)
        outputs = self._functions.classroom_loss_and_grad(
            *(student, mentors, targets, None, _constant(mentor_weight), *more, options),
            with_grad=with_grad,
            with_report=with_report,
        )
        loss = outputs.loss
        if with_grad:
            scale_rows = self._functions.scale_rows
            loss = operators.differentiable(student, outputs, options.reduction, scale_rows)
        return loss, unpack_report(outputs.report, len(mentors)) if with_report else None

    def loss_and_grad(
        self,
        student: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        mentor_weight: Tensor | None,
        scale: Tensor | None,
        options: LossOptions,
        with_report: bool,
        process_group: Any,
    ) -> tuple[Tensor, Tensor, ClassroomReport | None]:
        """`fused_classroom_loss_and_grad`, likewise."""
        mentors, *more = self._more(student, mentor_logits, targets, options, process_group)
        outputs = self._functions.classroom_loss_and_grad(
            *(student, mentors, targets, None, _constant(mentor_weight), *more, options),
            with_grad=True,
            with_report=with_report,
            scale_grad=True,
            scale=scale,
        )
        report = unpack_report(outputs.report, len(mentors)) if with_report else None
        return outputs.loss, outputs.grad, report

    def _more(
        self,
        student: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        options: LossOptions,
        process_group: Any,
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """The mentors, and for ranking "batch" the sums of ℓ."""
        mentors = mentor_logits.unbind() if isinstance(mentor_logits, Tensor) else mentor_logits
        ell_sums = None
        if options.ranking == "batch":
            ell_sums = self._functions.confidence_sums(student, mentors, targets, options)
            if process_group is not None:
                torch.distributed.all_reduce(ell_sums, group=process_group)
        return mentors, ell_sums


class _Kind:
    """Calls alike in all but their tensors' layout; ``plans`` is replaced, never changed."""

    def __init__(self) -> None:
        self.plans: tuple[Plan, ...] = ()


@lru_cache(_MAX_KINDS)
def _kind(*_: object) -> _Kind:
    return _Kind()


def find(*call: Any) -> Plan | None:
    """The plan of an earlier call like this one; None if there is none.

    ``call`` is what `_described` takes. Nothing of it has been checked.
    """
    described = _described(*call)
    if described is not None:
        kind, tensors = described
        for plan in kind.plans:
            if plan.serves(tensors):
                return plan
    return None


def keep(functions: Any, elements: int, *call: Any) -> None:
    """Let later calls like this one, which was valid, be run by these functions: see `Plan`."""
    described = _described(*call)
    if described is not None:
        kind, tensors = described
        if all(type(tensor) in operators.PLAIN for tensor in tensors):
            kind.plans = (Plan(tensors, functions, elements), *kind.plans[: _MAX_PLANS - 1])


def _described(
    function: str,
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    weights: LossWeights,
    scale: Tensor | None,
    options: LossOptions,
    return_report: object,
    interpreted: bool,
) -> tuple[_Kind, tuple[Tensor, ...]] | None:
    """The kind of a call of that function, and its tensors; None if it is not to be planned.

    Only calls with logits [B, C], without class or row weights, that nothing watches are planned.
    """
    if operators.is_watched() or type(student_logits) not in operators.PLAIN:
        return None
    shape = student_logits.shape
    mentor_weight, of_class, of_row = weights
    rows = len(shape) == 2 and of_class is None and of_row is None
    if not (rows and isinstance(return_report, bool)):
        return None
    mentors = mentor_logits if type(mentor_logits) in (list, tuple) else (mentor_logits,)
    tensors = student_logits, *mentors, targets
    given = None
    if mentor_weight is not None or scale is not None:
        given = mentor_weight is not None, scale is not None
        tensors += tuple(tensor for tensor in (mentor_weight, scale) if tensor is not None)
    with_grad = function == "loss" and _with_grad(student_logits)
    wanted = function, with_grad, return_report, interpreted
    kind = _kind(options, shape, wanted, given, len(mentors))
    return kind, tensors


def _with_grad(student: Tensor) -> bool:
    return student.requires_grad and torch.is_grad_enabled()


def _constant(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
