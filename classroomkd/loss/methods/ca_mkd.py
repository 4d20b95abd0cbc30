"""Distillation from several teachers, each weighted by its cross-entropy with the target.

Zhang, Chen, Wang: *Confidence-Aware Multi-Teacher Knowledge Distillation* (ICASSP 2022), the part
on the teachers' predictions, without that on intermediate layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from classroomkd.loss.methods.base import (
    RowMethod,
    check_not_negative,
    check_temperature,
    cross_entropy,
    tempered_kl,
)


class CAMKD(RowMethod):
    """CE(z_s, y) + alpha · T² · Σ_k w_k · KL(softmax(z_k / T) ‖ softmax(z_s / T)).

    In each row w_k = (1 − exp(CE_k) / Σ_j exp(CE_j)) / (K − 1), with CE_k the cross-entropy of
    teacher k's raw logits, for class probabilities too; the w_k sum to 1. A single teacher has
    weight 1. Where the paper has the cross-entropy of two softmaxes, this is their KL, of the same
    gradient.

    Args:
        temperature: T, above 0 and at most 40.
        alpha: weight of the distillation.

    """

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature)
        check_not_negative(alpha=alpha)
        self.temperature = temperature
        self.alpha = alpha

    def row_losses(self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The sum [B]."""
        T = self.temperature
        lessons = torch.stack([tempered_kl(student, mentor, T) for mentor in mentors])
        weights = torch.ones_like(lessons)
        if len(mentors) > 1:
            errors = torch.stack([cross_entropy(mentor, targets) for mentor in mentors])
            weights = (1 - torch.softmax(errors, 0)) / (len(mentors) - 1)
        return cross_entropy(student, targets) + self.alpha * T**2 * (weights * lessons).sum(0)
