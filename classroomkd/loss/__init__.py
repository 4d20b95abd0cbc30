"""The loss of logits: what it is, how it is called, and the methods that it is compared with.

``definition`` is the loss in plain PyTorch, of ``targets`` in the form that its formulas need, and
everything else is tested against it. A call of ``fused`` has its options checked by ``options`` and
its tensors by ``inputs``, and goes through ``operators``, PyTorch's face of the kernels, to
``classroomkd.kernels``; ``module`` is the same as a module, and what a batch was taught is a
``report``. ``methods`` has this and other ways to train a student behind one interface. Networks,
images and schedules are no concern of this folder.
"""

from typing import TYPE_CHECKING

from classroomkd.lazy import exports

if TYPE_CHECKING:
    from classroomkd.loss.definition import classroom_loss
    from classroomkd.loss.fused import fused_classroom_loss, fused_classroom_loss_and_grad
    from classroomkd.loss.module import ClassroomLoss
    from classroomkd.loss.options import automatic_mentor_weight
    from classroomkd.loss.report import ClassroomReport

__all__ = [
    "ClassroomLoss",
    "ClassroomReport",
    "automatic_mentor_weight",
    "classroom_loss",
    "fused_classroom_loss",
    "fused_classroom_loss_and_grad",
]
if not TYPE_CHECKING:  # checkers would take every name to be there
    __getattr__, __dir__ = exports(
        __name__,
        {
            "definition": "classroom_loss",
            "fused": "fused_classroom_loss fused_classroom_loss_and_grad",
            "module": "ClassroomLoss",
            "options": "automatic_mentor_weight",
            "report": "ClassroomReport",
        },
    )
