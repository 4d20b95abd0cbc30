"""Distillation of a hint: the student learns to predict the teacher's features half-way.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio: *FitNets: Hints for Thin Deep Nets* (2015),
section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.loss.methods.base import (
    Method,
    Outputs,
    Shape,
    check_not_negative,
    cross_entropy,
    mean_of_rows,
    select_rows,
    valid_rows,
)
from classroomkd.loss.methods.features import layers, paired, paired_features

_EPS = 1e-5  # as nn.BatchNorm2d has it


class FitNet(Method):
    """ce_weight · CE(z_s, y) + beta · mean of (r(f_s) − f_t)².

    f_s and f_t [B, C, H, W] are one stage's features, the larger map average-pooled to the
    smaller's size, and the mean is over rows, channels and positions. The regressor r is a 1×1
    convolution from the student's channels to the teacher's and a batch norm, without which
    training diverges at usual rates; its statistics are those of the rows that count. It is
    trained along. Both terms are trained together from the start, as the comparisons of the
    literature do it; the paper trains on the hint alone first.

    Args:
        stage: which pair of stages, from 1. Stages are paired from the last backwards, so there are
            as many as the network with fewer has. The middle one if None: the second of three or
            four.
        beta: weight of the hint.
        ce_weight: of the cross-entropy.
        student_layers: paths of the student's modules that give its features, like
            layer2.0,layer3; the zoo's networks have their stages if there are none.
        teacher_layers: likewise the teacher's; as many, paired one by one.

    """

    single_mentor = True
    uses_features = True

    def __init__(
        self,
        stage: int | None = None,
        beta: float = 100.0,
        ce_weight: float = 1.0,
        student_layers: str | Sequence[str] = "",
        teacher_layers: str | Sequence[str] = "",
    ) -> None:
        super().__init__()
        if not (stage is None or (type(stage) is int and stage >= 1)):
            raise UserError(f"stage must be a whole number of at least 1, got {stage!r}")
        check_not_negative(beta=beta, ce_weight=ce_weight)
        self.stage = stage
        self.beta = beta
        self.ce_weight = ce_weight
        self.student_layers, self.teacher_layers = layers(student_layers, teacher_layers)
        self.regressor: _Regressor | None = None

    def prepare(self, student: Sequence[Shape], mentors: Sequence[Sequence[Shape]]) -> None:
        """Create the regressor."""
        pairs = paired(student, mentors[0])
        stage = self.stage or (len(pairs) + 1) // 2
        if stage > len(pairs):
            raise UserError(
                f"method fitnet: stage must be at most {len(pairs)} for networks of {len(student)} "
                f"and {len(mentors[0])} stages, got {stage}"
            )
        self._index = stage - 1
        (student_channels, *_), (teacher_channels, *_) = pairs[self._index]
        self.regressor = _Regressor(student_channels, teacher_channels)

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """The weighted sum, 0-d."""
        assert self.regressor is not None, "prepare() comes first"
        valid = valid_rows(targets)
        guess, hint = paired_features(student, mentors[0], valid)[self._index]
        distance = (self.regressor(guess, valid) - hint).square().mean((1, 2, 3))
        task = cross_entropy(select_rows(student.logits, valid), targets)
        return mean_of_rows(self.ce_weight * task + self.beta * distance, valid)


class _Regressor(nn.Module):
    """A 1×1 convolution and a batch norm over some of the rows; never evaluated, only trained."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(out_channels))
        self.shift = nn.Parameter(torch.zeros(out_channels))

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        guess = self.conv(features)
        rows = valid.view(-1, 1, 1, 1)
        count = valid.sum().clamp(min=1) * guess[0, 0].numel()

        def mean(values: Tensor) -> Tensor:
            return torch.where(rows, values, 0).sum((0, 2, 3), keepdim=True) / count

        centred = guess - mean(guess)
        normalised = centred * (mean(centred.square()) + _EPS).rsqrt()
        return normalised * self.scale[:, None, None] + self.shift[:, None, None]
