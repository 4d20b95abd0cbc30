"""Ways to train a student: alone, in a classroom, and by the methods compared with it.

    method = create("kd", temperature=4.0)
    loss, report = method.backward(Outputs(student_logits), [Outputs(teacher_logits)], targets)

One file per method; ``base`` has the interface and the terms that several share, ``creation``
builds a method by name, and ``method_names`` lists names and options without importing torch.
"""

from typing import TYPE_CHECKING

from classroomkd.lazy import exports
from classroomkd.loss.methods.method_names import names

if TYPE_CHECKING:
    from classroomkd.loss.methods.base import IGNORED, Method, Outputs
    from classroomkd.loss.methods.creation import create

__all__ = ["IGNORED", "Method", "Outputs", "create", "names"]
if not TYPE_CHECKING:  # checkers would take every name to be there
    __getattr__, __dir__ = exports(
        __name__, {"base": "IGNORED Method Outputs", "creation": "create"}
    )
