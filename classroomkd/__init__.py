"""classroomkd: distil one student from many mentors with a fused Triton loss."""

from typing import TYPE_CHECKING

from classroomkd.lazy import exports

if TYPE_CHECKING:
    from classroomkd.distillation import distill
    from classroomkd.loss import (
        ClassroomLoss,
        ClassroomReport,
        RowReport,
        classroom_loss,
        fused_classroom_loss,
        fused_classroom_loss_and_grad,
        fused_linear_classroom_loss,
    )

__version__ = "0.1.0"
__all__ = [
    "ClassroomLoss",
    "ClassroomReport",
    "RowReport",
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
            "loss": " ".join(name for name in __all__ if name != "distill"),
        },
    )
