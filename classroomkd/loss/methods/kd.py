"""Knowledge distillation from one teacher.

Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network* (2015), section 2. With
``standardise``: Sun, Ren, Li, Wang, Cao: *Logit Standardization in Knowledge Distillation* (CVPR
2024), algorithms 1 and 2.
"""

from __future__ import annotations

from classroomkd.loss.methods.base import check_boolean, check_not_negative, check_temperature
from classroomkd.loss.methods.classroom import OnePass


class KD(OnePass):
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
        check_temperature(temperature)
        check_not_negative(ce_weight=ce_weight, kd_weight=kd_weight)
        check_boolean(standardise=standardise)
        super().__init__(
            temperature=temperature,
            weighting="uniform",
            task_weight=ce_weight,
            mentor_weight=kd_weight,
            standardise=standardise,
        )
