"""Distillation of a hint: the student learns to predict the teacher's features half-way.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio: *FitNets: Hints for Thin Deep Nets* (2015),
section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.loss.methods.base import (
    IGNORED,
    Method,
    Outputs,
    Shape,
    check_not_negative,
    cross_entropy,
    mean_of_rows,
    select_rows,
)
from classroomkd.loss.methods.features import paired, paired_features


class FitNet(Method):
    """ce_weight · CE(z_s, y) + beta · mean of (r(f_s) − f_t)².

    f_s and f_t [B, C, H, W] are one stage's features, the larger map average-pooled to the
    smaller's size, and the mean is over rows, channels and positions. The regressor r is a 1×1
    convolution with biases, from the student's channels to the teacher's, trained along; not
    followed by a batch norm, through which rows that do not count would. Both terms are trained
    together from the start, as the comparisons of the literature do it; the paper trains on the
    hint alone first.

    Args:
        stage: which pair of stages, from 1. Stages are paired from the last backwards, so there are
            as many as the network with fewer has. The middle one if None: the second of three or
            four.
        beta: weight of the hint.
        ce_weight: of the cross-entropy.

    """

    single_mentor = True
    uses_features = True

    def __init__(
        self, stage: int | None = None, beta: float = 100.0, ce_weight: float = 1.0
    ) -> None:
        super().__init__()
        if not (stage is None or (type(stage) is int and stage >= 1)):
            raise UserError(f"stage must be a whole number of at least 1, got {stage!r}")
        check_not_negative(beta=beta, ce_weight=ce_weight)
        self.stage = stage
        self.beta = beta
        self.ce_weight = ce_weight
        self.regressor: nn.Conv2d | None = None

    def prepare(self, student: Sequence[Shape], mentors: Sequence[Sequence[Shape]]) -> None:
        """Make the regressor."""
        pairs = paired(student, mentors[0])
        stage = self.stage or (len(pairs) + 1) // 2
        if stage > len(pairs):
            raise UserError(
                f"method fitnet: stage must be at most {len(pairs)} for networks of {len(student)} "
                f"and {len(mentors[0])} stages, got {stage}"
            )
        self._index = stage - 1
        (student_channels, *_), (teacher_channels, *_) = pairs[self._index]
        self.regressor = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """The weighted sum, 0-d."""
        valid = targets != IGNORED
        guess, hint = paired_features(student, mentors[0], valid)[self._index]
        distance = (self.regressor(guess) - hint).square().mean((1, 2, 3))
        task = cross_entropy(select_rows(student.logits, valid), targets)
        return mean_of_rows(self.ce_weight * task + self.beta * distance, valid)
