"""classroomkd: distil one student from many mentors with a fused Triton loss."""

from typing import TYPE_CHECKING

from classroomkd.lazy import exports

if TYPE_CHECKING:
    from classroomkd.distillation import distill
    from classroomkd.loss import (
        ClassroomLoss,
        ClassroomReport,
        classroom_loss,
        fused_classroom_loss,
        fused_classroom_loss_and_grad,
        fused_linear_classroom_loss,
    )
    from classroomkd.training.mentor_check import check_logits

__version__ = "0.1.0"
__all__ = [
    "ClassroomLoss",
    "ClassroomReport",
    "check_logits",
    "classroom_loss",
    "distill",
    "fused_classroom_loss",
    "fused_classroom_loss_and_grad",
    "fused_linear_classroom_loss",
]
if not TYPE_CHECKING:  # with __getattr__, type checkers would accept any name
    __getattr__, __dir__ = exports(
        __name__,
        {
            "distillation": "distill",
            "training.mentor_check": "check_logits",
            "loss": " ".join(set(__all__) - {"distill", "check_logits"}),
        },
    )
