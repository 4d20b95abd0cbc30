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
    check_temperature,
    cross_entropy,
    direction,
    mean_of_rows,
    select_rows,
    valid_rows,
)


class DIST(Method):
    """ce_weight · CE(z_s, y) + T² · (beta · inter + gamma · intra).

    With ρ Pearson's correlation and p = softmax(z / T) [B, C], student's and teacher's: inter is
    the mean over rows b of 1 − ρ(p_s[b, :], p_t[b, :]), intra the mean over classes c of
    1 − ρ(p_s[:, c], p_t[:, c]). The latter is over the rows of the batch that count. ρ is 0, and
    has no gradient, where one of the two is constant but for rounding (`direction`), as in a batch
    of one row or a row of a head that was initialised with zeros.

    Args:
        temperature: T, above 0 and at most 20. 4 is published for CIFAR-100, as are both
            weights; for ImageNet it is 1.
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
        check_temperature(temperature)
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
        inter = mean_of_rows(1 - _correlation(p_s, p_t, 1, torch.ones_like(p_s)), valid)
        of_class = _correlation(p_s, p_t, 0, valid[:, None].expand_as(p_s).to(p_s.dtype))
        intra = torch.where(valid.any(), 1 - of_class, 0).mean()
        task = mean_of_rows(cross_entropy(logits, targets), valid)
        return self.ce_weight * task + T**2 * (self.beta * inter + self.gamma * intra)


def _correlation(a: Tensor, b: Tensor, dim: int, counts: Tensor) -> Tensor:
    """Pearson's along ``dim``, over where ``counts`` is 1 and not 0."""
    n = counts.sum(dim, keepdim=True).clamp(min=1)
    directions = []
    for values in (a * counts, b * counts):
        centred = (values - values.sum(dim, keepdim=True) / n) * counts
        directions.append(direction(centred, values, dim))
    return (directions[0] * directions[1]).sum(dim)
