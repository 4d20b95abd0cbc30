"""Ways to train a student: alone, in a classroom, and by the methods compared with it.

    method = create("kd", temperature=4.0)
    loss, report = method.backward(Outputs(student_logits), [Outputs(teacher_logits)], targets)

A file a method; ``base`` has the interface and the terms that several share, ``registry`` all by
name.
"""

from classroomkd.loss.methods.base import IGNORED, Method, Outputs
from classroomkd.loss.methods.registry import create, names

__all__ = ["IGNORED", "Method", "Outputs", "create", "names"]
