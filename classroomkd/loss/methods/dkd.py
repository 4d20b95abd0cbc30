"""Distillation of the target's share and of the other classes' shares, decoupled.

Zhao, Cui, Song, Qiu, Liang: *Decoupled Knowledge Distillation* (CVPR 2022), section 3.
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


class DKD(RowMethod):
    """ce_weight · CE(z_s, y) + T² · (alpha · TCKD + beta · NCKD).

    Of p = softmax(z / T), teacher's and student's: TCKD is the KL of the pair (p_y, 1 − p_y); NCKD
    is the KL of the softmaxes of the classes other than y. Without the decoupling beta would be the
    teacher's 1 − p_y. Of class probabilities there is no one y to split at: they are not taken. The
    published training also raises alpha and beta linearly from 0 in its first 20 epochs; that
    schedule is not part of this loss.

    Args:
        temperature: T, above 0 and at most 20.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        ce_weight: of the cross-entropy.

    """

    single_mentor = True
    soft_labels = False

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_not_negative(alpha=alpha, beta=beta, ce_weight=ce_weight)
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.ce_weight = ce_weight

    def row_losses(self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The weighted sum [B]."""
        T, C = self.temperature, student.shape[-1]
        logits = [student / T, mentors[0] / T]
        is_target = targets[:, None] == torch.arange(C, device=targets.device)
        log_s, log_t = (_log_target_and_rest(z, is_target) for z in logits)
        others_s, others_t = (_without(z, is_target) for z in logits)
        tckd = kl(log_t.exp(), log_s)
        nckd = kl(F.softmax(others_t, -1), F.log_softmax(others_s, -1))
        decoupled = self.alpha * tckd + self.beta * nckd
        return self.ce_weight * cross_entropy(student, targets) + T**2 * decoupled


def _log_target_and_rest(logits: Tensor, is_target: Tensor) -> Tensor:
    """log p_y and log(1 − p_y) [B, 2], the latter exact where p_y is nearly 1."""
    log_p = F.log_softmax(logits, -1)
    target = torch.where(is_target, log_p, 0).sum(-1)
    return torch.stack([target, _without(log_p, is_target).logsumexp(-1)], -1)


def _without(values: Tensor, is_target: Tensor) -> Tensor:
    # Not −inf: where there is one class only, nothing would be left to make a softmax of.
    return values.masked_fill(is_target, torch.finfo(values.dtype).min)
