"""Calls of the loss as users write them, for mypy: nothing here runs."""

from typing import assert_type

import torch
from torch import Tensor

from classroomkd import (
    ClassroomLoss,
    ClassroomReport,
    RowReport,
    classroom_loss,
    fused_classroom_loss,
    fused_classroom_loss_and_grad,
)


def functions(student: Tensor, mentors: Tensor, targets: Tensor, flag: bool) -> None:
    loss = fused_classroom_loss(student, mentors, targets, temperature=4.0)
    loss.backward()
    assert_type(classroom_loss(student, [*mentors], targets, mentor_weight="auto"), Tensor)
    with_report = fused_classroom_loss(student, mentors, targets, return_report=True)
    assert_type(with_report, tuple[Tensor, ClassroomReport])
    by_row = fused_classroom_loss(student, mentors, targets, return_report="rows")
    assert_type(by_row, tuple[Tensor, RowReport])
    either = fused_classroom_loss(student, mentors, targets, return_report=flag)
    assert_type(either, Tensor | tuple[Tensor, ClassroomReport])
    loss, grad = fused_classroom_loss_and_grad(student, mentors, targets, scale=torch.ones(()))
    student.backward(grad)
    loss, grad, report = fused_classroom_loss_and_grad(
        student, mentors, targets, mentor_weight=0.3, return_report=True
    )
    assert_type(report.mentor_loss, Tensor)
    fused_classroom_loss(student, mentors, targets, temprature=4.0)  # type: ignore[call-overload]
    fused_classroom_loss(student, mentors, targets, ranking=4)  # type: ignore[call-overload]


def module(student: Tensor, mentors: Tensor, targets: Tensor) -> None:
    loss_fn = ClassroomLoss(temperature=4.0, mentor_weight=[1.0, 0.5])
    loss_fn(student, mentors, targets).backward()
    assert_type(loss_fn(student, mentors, targets), Tensor)
    with_report = loss_fn(student, mentors, targets, return_report=True)
    assert_type(with_report, tuple[Tensor, ClassroomReport])
    assert_type(loss_fn.loss_and_grad(student, mentors, targets), tuple[Tensor, Tensor])
    ClassroomLoss(temprature=4.0)  # type: ignore[call-arg]
