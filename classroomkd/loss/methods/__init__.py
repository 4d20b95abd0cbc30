"""Ways to train a student: alone, in a classroom, and by the methods compared with it.

method = create("kd", temperature=4.0)
loss, report = method.backward(Outputs(student_logits), [Outputs(teacher_logits)], targets)
"""

from classroomkd.loss.methods.base import Method, Outputs
from classroomkd.loss.methods.registry import create, names

__all__ = ["Method", "Outputs", "create", "names"]
