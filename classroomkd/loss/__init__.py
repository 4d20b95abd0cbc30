"""The loss: its definition, the fused pass, and the methods that it is compared with.

``definition`` is the loss in plain PyTorch; everything else is tested against it. ``targets``
brings targets into the form of its formulas. ``fused`` checks a call's options (``options``) and
tensors (``inputs``), and runs the kernels of ``classroomkd.kernels``, or a CPU's pass, through the
PyTorch operators in ``operators``; ``rows`` flattens dense outputs and weighs classes and rows.
``module`` is the same as an `nn.Module`, ``classroom_report`` a batch's statistics, ``signatures``
what type checkers see. ``methods`` has this and other ways to train a student behind one interface.
Nothing here knows of networks, images or schedules.
"""

from typing import TYPE_CHECKING

from classroomkd.lazy import exports

if TYPE_CHECKING:
    from classroomkd.loss.classroom_report import ClassroomReport, RowReport
    from classroomkd.loss.definition import classroom_loss
    from classroomkd.loss.fused import fused_classroom_loss, fused_classroom_loss_and_grad
    from classroomkd.loss.linear import cut_vocabulary, fused_linear_classroom_loss
    from classroomkd.loss.module import ClassroomLoss
    from classroomkd.loss.options import automatic_mentor_weight

__all__ = [
    "ClassroomLoss",
    "ClassroomReport",
    "RowReport",
    "automatic_mentor_weight",
    "classroom_loss",
    "cut_vocabulary",
    "fused_classroom_loss",
    "fused_classroom_loss_and_grad",
    "fused_linear_classroom_loss",
]
if not TYPE_CHECKING:  # checkers would take every name to be there
    __getattr__, __dir__ = exports(
        __name__,
        {
            "definition": "classroom_loss",
            "fused": "fused_classroom_loss fused_classroom_loss_and_grad",
            "linear": "cut_vocabulary fused_linear_classroom_loss",
            "module": "ClassroomLoss",
            "options": "automatic_mentor_weight",
            "classroom_report": "ClassroomReport RowReport",
        },
    )
