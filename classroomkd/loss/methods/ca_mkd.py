"""Distillation from several teachers, each weighted by its cross-entropy with the target.

Zhang, Chen, Wang: *Confidence-Aware Multi-Teacher Knowledge Distillation* (ICASSP 2022), the part
on the teachers' predictions, without that on intermediate layers.
"""

from __future__ import annotations

from classroomkd.loss.methods.base import check_not_negative, check_temperature
from classroomkd.loss.methods.classroom import OnePass


class CAMKD(OnePass):
    """CE(z_s, y) + alpha · T² · Σ_k w_k · KL(softmax(z_k / T) ‖ softmax(z_s / T)).

    In each row w_k = (1 − exp(CE_k) / Σ_j exp(CE_j)) / (K − 1), with CE_k the cross-entropy of
    teacher k's raw logits, for class probabilities too; the w_k sum to 1. A single teacher has
    weight 1. Where the paper has the cross-entropy of two softmaxes, this is their KL, of the same
    gradient.

    Args:
        temperature: T, above 0 and at most 20.
        alpha: weight of the distillation.

    """

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0) -> None:
        check_temperature(temperature)
        check_not_negative(alpha=alpha)
        super().__init__(
            temperature=temperature, weighting="confidence", task_weight=1.0, mentor_weight=alpha
        )
