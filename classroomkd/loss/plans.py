"""Calls like earlier ones, which need no checks and repeat their launches.

Whether a call is valid, and how it is run, depends on its options and on its tensors' types,
dtypes, devices, shapes, strides and alignment; on their values only for class indices on a CPU,
which each call looks at. All this is compared with what earlier calls had. PyTorch's own guard of
compiled code compares the tensors, in a fraction of the time that looking at each would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

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
_ALIGNMENT = 128
"""Bytes; no kernel's plan looks further: 16 elements, see ``kernels/layout.py``."""


class Plan:
    """How calls with such tensors are run.

    ``functions`` are those of ``cpu_pass.py``, or the kernels' `Launches`.
    """

    def __init__(self, tensors: Sequence[Tensor], functions: Any) -> None:
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._offsets = _offsets(tensors)
        self._functions = functions

    def serves(self, tensors: Sequence[object]) -> bool:
        """Whether these are such tensors."""
        return self._guards.check(*tensors) and _offsets(tensors) == self._offsets

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
        with_grad = student.requires_grad and torch.is_grad_enabled()
        outputs, report = self._run(
            *(student, mentor_logits, targets, mentor_weight, options, with_report, process_group),
            with_grad=with_grad,
        )
        loss = outputs.loss
        if with_grad:
            loss = operators.differentiable(
                student, outputs, options.reduction, self._functions.scale_rows
            )
        return loss, report

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
        outputs, report = self._run(
            *(student, mentor_logits, targets, mentor_weight, options, with_report, process_group),
            with_grad=True,
            scale_grad=True,
            scale=scale,
        )
        return outputs.loss, outputs.grad, report

    def _run(
        self,
        student: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        mentor_weight: Tensor | None,
        options: LossOptions,
        with_report: bool,
        process_group: Any,
        **wanted: Any,
    ) -> tuple[Any, ClassroomReport | None]:
        if isinstance(mentor_logits, Tensor):
            mentor_logits = mentor_logits.unbind()
        if mentor_weight is not None:
            mentor_weight = mentor_weight.detach()
        ell_sums = None
        if options.ranking == "batch":
            ell_sums = self._functions.confidence_sums(student, mentor_logits, targets, options)
            if process_group is not None:
                torch.distributed.all_reduce(ell_sums, group=process_group)
        outputs = self._functions.classroom_loss_and_grad(
            *(student, mentor_logits, targets, mentor_weight, ell_sums, options),
            with_report=with_report,
            **wanted,
        )
        n_mentors = len(mentor_logits)
        return outputs, unpack_report(outputs.report, n_mentors) if with_report else None


class _Kind:
    """Calls alike in all but their tensors' layout; ``plans`` is replaced, never changed."""

    def __init__(self) -> None:
        self.plans: tuple[Plan, ...] = ()


@lru_cache(_MAX_KINDS)
def _kind(*_: object) -> _Kind:
    return _Kind()


class Call(NamedTuple):
    """A call that may have a plan, or get one."""

    tensors: tuple[Tensor, ...]
    kind: _Kind

    def plan(self) -> Plan | None:
        """That of an earlier call like this one; None if there was none."""
        for plan in self.kind.plans:
            if plan.serves(self.tensors):
                return plan
        return None

    def keep(self, functions: Any) -> None:
        """Let later calls like this one, which was valid, be run by these functions."""
        if all(type(tensor) in operators.PLAIN for tensor in self.tensors):
            plan = Plan(self.tensors, functions)
            self.kind.plans = (plan, *self.kind.plans[: _MAX_PLANS - 1])


def planned(
    function: str,
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    weights: LossWeights,
    scale: Tensor | None,
    options: LossOptions,
    return_report: object,
    interpreted: bool,
) -> Call | None:
    """The call with these arguments, which are not checked; None if it is not to be planned.

    Only rows of logits are, without weights of classes or rows, where nothing traces the call.
    """
    if operators.is_watched() or type(student_logits) not in operators.PLAIN:
        return None
    shape = student_logits.shape
    if len(shape) != 2 or weights.row is not None or weights.of_class is not None:
        return None
    if not isinstance(return_report, bool):
        return None
    mentors = mentor_logits if type(mentor_logits) in (list, tuple) else (mentor_logits,)
    further = [tensor for tensor in (weights.mentor, scale) if tensor is not None]
    wanted = function, return_report, interpreted
    given = len(mentors), weights.mentor is not None, scale is not None
    kind = _kind(options, shape, wanted, given)
    return Call((student_logits, *mentors, targets, *further), kind)


def _offsets(tensors: Sequence[Any]) -> list[int]:
    return [tensor.data_ptr() % _ALIGNMENT for tensor in tensors]
