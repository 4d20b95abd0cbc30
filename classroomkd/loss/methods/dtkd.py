"""Distillation at temperatures that make the student's and the teacher's outputs equally sharp.

Wei, Bai: *Dynamic Temperature Knowledge Distillation* (2024), section 3.
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
    tempered_kl,
)

_MIN_TEMPERATURE = 1e-20  # softmax picks a class by then


class DTKD(RowMethod):
    """alpha · T_s T_t KL_dynamic + beta · T² KL_T + gamma · CE(z_s, y).

    With x the largest logit of a row, KL_dynamic = KL(softmax(z_t / T_t) ‖ softmax(z_s / T_s)) at

        T_s = 2 x_s / (x_s + x_t) · T,   T_t = 2 x_t / (x_s + x_t) · T,

    both T where x_s or x_t is not positive; they are constants to the derivative. KL_T has T for
    both. The published training also raises alpha and beta linearly from 0 in its first 20 epochs;
    that schedule is not part of this loss.

    Args:
        temperature: T, above 0 and at most 20.
        alpha: weight of the dynamic term.
        beta: weight of the term at T.
        gamma: weight of the cross-entropy.

    """

    single_mentor = True

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 3.0,
        beta: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_not_negative(alpha=alpha, beta=beta, gamma=gamma)
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    def row_losses(self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The weighted sum [B]."""
        T, teacher = self.temperature, mentors[0]
        x_s, x_t = student.detach().amax(-1, keepdim=True), teacher.amax(-1, keepdim=True)
        both_positive = (x_s > 0) & (x_t > 0)
        # x_s + x_t may be beyond float32, and a quotient, so that the temperature would be 0.
        T_s = torch.where(both_positive, 2 * T / (1 + x_t / x_s), T).clamp_min(_MIN_TEMPERATURE)
        T_t = torch.where(both_positive, 2 * T / (1 + x_s / x_t), T).clamp_min(_MIN_TEMPERATURE)
        p_t = F.softmax((teacher - x_t) / T_t, -1)
        dynamic = kl(p_t, F.log_softmax((student - x_s) / T_s, -1))
        return (
            self.alpha * (T_s * T_t).squeeze(-1) * dynamic
            + self.beta * T**2 * tempered_kl(student, teacher, T)
            + self.gamma * cross_entropy(student, targets)
        )
