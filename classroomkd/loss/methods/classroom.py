"""The classroom: mentors ranked, filtered and softened row by row.

Sarode, Khan, Shehzadi, Stricker, Afzal: *Classroom-Inspired Multi-Mentor Distillation with Adaptive
Learning Strategies* (IntelliSys 2025). The loss is `classroomkd.ClassroomLoss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from classroomkd.errors import UserError
from classroomkd.loss.classroom_report import ClassroomReport
from classroomkd.loss.definition import confidence_and_correctness, rank_and_filter
from classroomkd.loss.methods.base import (
    Method,
    Outputs,
    check_boolean,
    select_rows,
    standardised,
    valid_rows,
)
from classroomkd.loss.module import ClassroomLoss
from classroomkd.loss.options import OptionValues
from classroomkd.loss.targets import prepare_targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Classroom(Method):
    """a_s · CE(z_s, t) + Σ_m active_m · g_m · r_m · τ_m² · KL_m.

    With ``standardise`` every row of logits, the student's and each mentor's, is replaced by its
    z-score in the sum: in the ranks r, the filter, the temperatures τ and KL. The first term and
    its weight a_s remain those of the raw logits. So it is ClassroomLoss with task weight 0 on the
    z-scores, plus the task's part of ClassroomLoss on the raw logits. In the report the mentors'
    entries are then of the z-scores, the student's confidence and task loss of the raw logits.

    Args:
        standardise: whether the mentors' terms compare z-scores of the rows of logits.
        mentor_weight: weight g_m of the mentors' terms: a number, or "auto", which is
            min(1, max(1/2, C / 200) / M) for C classes and M mentors; None is 1. In Python also one
            number for each mentor.
        process_group, **options: those of ClassroomLoss; reduction is not "none".

    """

    reports = True

    def __init__(
        self,
        *,
        standardise: bool = False,
        mentor_weight: Sequence[float] | Tensor | float | str | None = None,
        process_group: ProcessGroup | None = None,
        **options: Unpack[OptionValues],
    ) -> None:
        super().__init__()
        check_boolean(standardise=standardise)
        if options.get("reduction") == "none":
            raise UserError("reduction must be 'mean' or 'sum' where a student is trained")
        self.standardise = standardise

        loss = partial(ClassroomLoss, process_group=process_group)
        try:
            self.loss = loss(mentor_weight=mentor_weight, **options)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None
        if standardise:
            without_task: OptionValues = {**options, "task_weight": 0.0}
            self.mentor_loss = loss(mentor_weight=mentor_weight, **without_task)
            # The student as its own only mentor, of no weight: only the task is left.
            self.task = loss(mentor_weight=0.0, **options)

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """The loss."""
        logits, mentor_logits = student.logits, [mentor.logits for mentor in mentors]
        if not self.standardise:
            return self.loss(logits, mentor_logits, targets)
        scores, *mentor_scores = self._scores([logits, *mentor_logits], targets)
        task = self.task(logits, [logits.detach()], targets)
        return task + self.mentor_loss(scores, mentor_scores, targets)

    def backward(
        self,
        student: Outputs,
        mentors: Sequence[Outputs],
        targets: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, ClassroomReport]:
        """Loss and gradient in one launch, two with ``standardise``, and no graph between them."""
        logits, mentor_logits = student.logits, [mentor.logits for mentor in mentors]
        if not self.standardise:
            loss, grad, report = self.loss.loss_and_grad(
                logits, mentor_logits, targets, scale=scale, return_report=True
            )
            logits.backward(grad)
            return loss, report
        scores, *mentor_scores = self._scores([logits, *mentor_logits], targets)
        mentor_loss, score_grad, report = self.mentor_loss.loss_and_grad(
            scores, mentor_scores, targets, scale=scale, return_report=True
        )
        task, grad, raw = self.task.loss_and_grad(
            logits, [logits.detach()], targets, scale=scale, return_report=True
        )
        torch.autograd.backward([scores, logits], [score_grad, grad])
        report = report._replace(student_confidence=raw.student_confidence, task_loss=raw.task_loss)
        return mentor_loss + task, report

    def standing(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What `teaches` asks of one network: of logits [B, C] and class indices, each [B].

        The log-confidence, float32 or better, and whether no logit is above the target class's.
        """
        if self.standardise:
            (logits,) = self._scores([logits], targets)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = prepare_targets(targets, logits.shape[1], self.loss.options, logits.dtype)
        return confidence_and_correctness(logits, target)

    def teaches(
        self,
        student: tuple[Tensor, Tensor],
        mentors: Sequence[tuple[Tensor, Tensor]],
        process_group: ProcessGroup | None = None,
    ) -> Tensor:
        """In which rows each mentor teaches, bool [M, B], by the ``standing`` of everyone.

        With ranking "batch" the rows, those of all processes of the group, are one batch.
        """
        confidences, correct = map(torch.stack, zip(student, *mentors, strict=True))
        valid = torch.ones_like(correct[0])
        options = self.loss.options
        return rank_and_filter(confidences, correct[1:], valid, options, process_group).active

    def _scores(self, everyone: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
        """The z-scores of logits [B, C] each."""
        valid = valid_rows(targets, self.loss.options.ignore_index)
        return [standardised(select_rows(logits, valid)) for logits in everyone]


class OnePass(Method):
    """A method that is a classroom without a filter at one temperature, and so one fused pass.

    Args:
        **options: those of Classroom, but for the filter and the mentoring.

    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._classroom = Classroom(knowledge_filter="none", mentoring="fixed", **options)

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """The loss."""
        return self._classroom(student, self._teachers(mentors), targets)

    def backward(
        self,
        student: Outputs,
        mentors: Sequence[Outputs],
        targets: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Loss and gradient from the one pass; no report."""
        loss, _ = self._classroom.backward(student, self._teachers(mentors), targets, scale)
        return loss, None

    def _teachers(self, mentors: Sequence[Outputs]) -> Sequence[Outputs]:
        return mentors[:1] if self.single_mentor else mentors
