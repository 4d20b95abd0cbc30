"""Knowledge distillation from one teacher.

Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network* (2015), section 2. With
``standardise``: Sun, Ren, Li, Wang, Cao: *Logit Standardization in Knowledge Distillation* (CVPR
2024), algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from classroomkd.loss.methods.base import (
    RowMethod,
    check_boolean,
    check_not_negative,
    check_temperature,
    cross_entropy,
    standardised,
    tempered_kl,
)


class KD(RowMethod):
    """ce_weight · CE(z_s, y) + kd_weight · T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)).

    Args:
        temperature: T, above 0 and at most 20. 4 is what the CIFAR-100 tables use, as are
            both weights.
        ce_weight: of the cross-entropy.
        kd_weight: of the distillation.
        standardise: replace each row of logits in the second term by its z-score. Its paper goes
            with temperature 2 and kd_weight 9.

    """

    single_mentor = True

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_not_negative(ce_weight=ce_weight, kd_weight=kd_weight)
        check_boolean(standardise=standardise)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.standardise = standardise

    def row_losses(self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The weighted sum [B]."""
        task, teacher = cross_entropy(student, targets), mentors[0]
        if self.standardise:
            student, teacher = standardised(student), standardised(teacher)
        lesson = self.temperature**2 * tempered_kl(student, teacher, self.temperature)
        return self.ce_weight * task + self.kd_weight * lesson
