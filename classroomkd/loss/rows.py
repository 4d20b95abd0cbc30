"""Batches as rows: dense outputs, and weights of classes and rows.

Logits [B, C, d₁, …] mean what they mean to `torch.nn.functional.cross_entropy`: every position is a
row. The fused pass takes them as [B, C, P], the definition flattened to rows [N, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from classroomkd.kernels.layout import flattened
from classroomkd.loss.inputs import check_inputs
from classroomkd.loss.options import LossOptions


class LossWeights(NamedTuple):
    """The weights that are tensors."""

    mentor: Tensor | None  # [M]
    of_class: Tensor | None = None  # [C]
    row: Tensor | None = None  # [B, d₁, …]


class Rows(NamedTuple):
    """A checked batch, every position of which is a row; N = B · P of dense outputs."""

    student: Tensor  # [N, C] or [B, C, P]
    mentors: list[Tensor]  # M of the same shape
    targets: Tensor  # [N], or the same shape
    weight: Tensor | None  # [N], float32 or float64
    shape: torch.Size  # [B, d₁, …]

    def flat(self) -> Rows:
        """The same batch with logits and probabilities [N, C]."""
        return self._replace(
            student=flattened(self.student),
            mentors=[flattened(mentor) for mentor in self.mentors],
            targets=flattened(self.targets) if self.targets.dim() > 1 else self.targets,
        )


def as_rows(
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    weights: LossWeights,
    options: LossOptions,
) -> Rows:
    """Check a batch, and flatten its positions; rows [B, C] stay the tensors that they are.

    Raises:
        ValueError, TypeError: see `check_inputs`.

    """
    mentors = check_inputs(student_logits, mentor_logits, targets, *weights)
    shape = torch.Size((student_logits.shape[0], *student_logits.shape[2:]))
    if student_logits.dim() > 2:
        # Views where images are contiguous or channels-last.
        targets = targets.reshape(-1) if targets.shape == shape else targets.flatten(2)
        student_logits = student_logits.flatten(2)
        mentors = [mentor.flatten(2) for mentor in mentors]
    row_weight = None
    if weights.row is not None:
        row_weight = _constant(weights.row).reshape(-1)
    if weights.of_class is not None:
        by_class = _of_classes(_constant(weights.of_class), targets, options.ignore_index)
        row_weight = by_class if row_weight is None else row_weight * by_class
    elif row_weight is not None and targets.dim() == 1:
        row_weight = torch.where(targets == options.ignore_index, 0, row_weight)
    return Rows(student_logits, mentors, targets, row_weight, shape)


def weighted(losses: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    """Losses of rows [N] times their weights [N], reduced; without weight to share, a mean is 0."""
    losses = losses * row_weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = row_weight.sum()
    return losses.sum() / torch.where(total == 0, 1, total)


def _of_classes(class_weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Each row's Σ_c t_c · weight_c [N], before smoothing; 0 in rows that do not count."""
    if targets.dim() > 1:
        t = targets.detach().to(class_weight.dtype)
        return t @ class_weight if t.dim() == 2 else torch.matmul(class_weight, t).reshape(-1)
    named = (targets >= 0) & (targets < len(class_weight))  # of other rows the loss is NaN anyway
    weight = class_weight[torch.where(named, targets, 0).long()]
    return torch.where(targets == ignore_index, 0, weight)


def _constant(weight: Tensor) -> Tensor:
    """Without gradient, and float32 unless float64."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
