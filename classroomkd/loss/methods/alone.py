"""The student alone: the cross-entropy with the targets, without mentors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from classroomkd.loss.methods.base import RowMethod, cross_entropy


class Alone(RowMethod):
    """CE(z_s, y). It has no options and does not use the mentors."""

    def row_losses(self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The cross-entropy [B]."""
        return cross_entropy(student, targets)
