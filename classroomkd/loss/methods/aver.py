"""Distillation from the mean of the mentors' soft targets.

You, Xu, Xu, Tao: *Learning from Multiple Teacher Networks* (KDD 2017), section 3.1, where the
teachers' tempered softmaxes are averaged with equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from classroomkd.loss.methods.base import (
    RowMethod,
    check_not_negative,
    check_temperature,
    cross_entropy,
    kl,
)


class AVER(RowMethod):
    """ce_weight · CE(z_s, y) + kd_weight · T² · KL(1/M Σ_m softmax(z_m / T) ‖ softmax(z_s / T)).

    Args:
        temperature: T, above 0 and at most 20.
        ce_weight: of the cross-entropy.
        kd_weight: of the distillation.

    """

    def __init__(
        self, temperature: float = 4.0, ce_weight: float = 0.1, kd_weight: float = 0.9
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_not_negative(ce_weight=ce_weight, kd_weight=kd_weight)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight

    def row_losses(self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The weighted sum [B]."""
        T = self.temperature
        teacher = F.softmax(torch.stack(list(mentors)) / T, -1).mean(0)
        kd_term = T**2 * kl(teacher, F.log_softmax(student / T, -1))
        return self.ce_weight * cross_entropy(student, targets) + self.kd_weight * kd_term
