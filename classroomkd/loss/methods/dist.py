"""Distillation by correlation instead of KL: of each row's classes, and of each class's rows.

Huang, You, Wang, Qian, Xu: *Knowledge Distillation from A Stronger Teacher* (NeurIPS 2022),
section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from classroomkd.loss.methods.base import (
    Method,
    Outputs,
    check_not_negative,
    check_positive,
    cross_entropy,
    mean_of_rows,
    select_rows,
    valid_rows,
)


class DIST(Method):
    """ce_weight · CE(z_s, y) + T² · (beta · inter + gamma · intra).

    With ρ Pearson's correlation and p = softmax(z / T) [B, C], student's and teacher's: inter is
    the mean over rows b of 1 − ρ(p_s[b, :], p_t[b, :]), intra the mean over classes c of
    1 − ρ(p_s[:, c], p_t[:, c]). The latter is over the rows of the batch that count. ρ is 0 where
    one of the two does not vary, as in a batch of one row.

    Args:
        temperature: T, above 0. 4 is published for CIFAR-100, as are both weights; for ImageNet
            it is 1.
        beta: weight of the relation among classes.
        gamma: weight of the relation among rows.
        ce_weight: of the cross-entropy.

    """

    single_mentor = True

    def __init__(
        self,
        temperature: float = 4.0,
        beta: float = 2.0,
        gamma: float = 2.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_not_negative(beta=beta, gamma=gamma, ce_weight=ce_weight)
        self.temperature = temperature
        self.beta = beta
        self.gamma = gamma
        self.ce_weight = ce_weight

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """The weighted sum, 0-d."""
        T, valid = self.temperature, valid_rows(targets)
        logits = select_rows(student.logits, valid)
        teacher = select_rows(mentors[0].logits.detach(), valid)
        p_s, p_t = F.softmax(logits / T, -1), F.softmax(teacher / T, -1)
        inter = mean_of_rows(1 - _correlation(p_s, p_t, 1), valid)
        count = valid.sum().clamp(min=1)
        centred = [torch.where(valid[:, None], p - _sum(p, valid) / count, 0) for p in (p_s, p_t)]
        intra = torch.where(valid.any(), 1 - _cosine(*centred, 0), 0).mean()
        task = mean_of_rows(cross_entropy(logits, targets), valid)
        return self.ce_weight * task + T**2 * (self.beta * inter + self.gamma * intra)


def _sum(p: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[:, None], p, 0).sum(0)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return _cosine(a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim)


def _cosine(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """0, and without gradient, where one of the two is 0."""
    return (F.normalize(a, dim=dim, eps=1e-8) * F.normalize(b, dim=dim, eps=1e-8)).sum(dim)
