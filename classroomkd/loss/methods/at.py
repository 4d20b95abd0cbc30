"""Distillation of attention: where in the image the teacher's features are strong.

Zagoruyko, Komodakis: *Paying More Attention to Attention: Improving the Performance of
Convolutional Neural Networks via Attention Transfer* (2017), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from classroomkd.loss.methods.base import (
    Method,
    Outputs,
    check_not_negative,
    cross_entropy,
    mean_of_rows,
    select_rows,
    valid_rows,
)
from classroomkd.loss.methods.features import layers, paired_features


class AT(Method):
    """ce_weight · CE(z_s, y) + beta · Σ_stages mean of (Q_s / ‖Q_s‖ − Q_t / ‖Q_t‖)².

    Q [B, H·W] is the mean over channels of the squared features of a stage, ‖·‖ the Euclidean norm
    of a row, and the mean is over rows and positions. Stages are paired from the last backwards,
    and of a pair the larger map is average-pooled to the smaller's size first.

    Args:
        beta: weight of the attention.
        ce_weight: of the cross-entropy.
        student_layers: paths of the student's modules that give its features, like
            layer2.0,layer3; the zoo's networks have their stages if there are none.
        teacher_layers: likewise the teacher's; as many, paired one by one.

    """

    single_mentor = True
    uses_features = True

    def __init__(
        self,
        beta: float = 1000.0,
        ce_weight: float = 1.0,
        student_layers: str | Sequence[str] = "",
        teacher_layers: str | Sequence[str] = "",
    ) -> None:
        super().__init__()
        check_not_negative(beta=beta, ce_weight=ce_weight)
        self.beta = beta
        self.ce_weight = ce_weight
        self.student_layers, self.teacher_layers = layers(student_layers, teacher_layers)

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """The weighted sum, 0-d."""
        valid = valid_rows(targets)
        rows = self.ce_weight * cross_entropy(select_rows(student.logits, valid), targets)
        for ours, theirs in paired_features(student, mentors[0], valid):
            distance = (_attention(ours) - _attention(theirs)).square().mean(1)
            rows = rows + self.beta * distance
        return mean_of_rows(rows, valid)


def _attention(features: Tensor) -> Tensor:
    return F.normalize(features.square().mean(1).flatten(1))
