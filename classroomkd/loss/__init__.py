"""The loss: its definition in PyTorch, the fused operator, the module, their options and report."""

from classroomkd.loss.definition import classroom_loss
from classroomkd.loss.fused import fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.loss.module import ClassroomLoss
from classroomkd.loss.report import ClassroomReport

__all__ = [
    "ClassroomLoss",
    "ClassroomReport",
    "classroom_loss",
    "fused_classroom_loss",
    "fused_classroom_loss_and_grad",
]
