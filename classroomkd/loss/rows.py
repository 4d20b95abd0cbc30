"""Batches as rows: dense outputs flattened, and weights of classes and rows.

Logits [B, C, d₁, …] mean what they mean to `torch.nn.functional.cross_entropy`: every position is a
row. The loss itself, by definition or fused, takes rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from classroomkd.loss.inputs import check_inputs
from classroomkd.loss.options import LossOptions


class LossWeights(NamedTuple):
    """The weights that are tensors."""

    mentor: Tensor | None  # [M]
    of_class: Tensor | None = None  # [C]
    row: Tensor | None = None  # [B, d₁, …]


class Rows(NamedTuple):
    """A checked batch with every position as a row."""

    student: Tensor  # [N, C]
    mentors: list[Tensor]  # M of [N, C]
    targets: Tensor  # [N] or [N, C]
    weight: Tensor | None  # [N], float32 or float64
    shape: torch.Size  # [B, d₁, …]


def as_rows(
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    weights: LossWeights,
    options: LossOptions,
) -> Rows:
    """Check a batch, and flatten it; rows [B, C] stay the tensors that they are.

    Raises:
        ValueError, TypeError: see `check_inputs`.

    """
    mentors = check_inputs(student_logits, mentor_logits, targets, *weights)
    shape = torch.Size((student_logits.shape[0], *student_logits.shape[2:]))
    if student_logits.dim() > 2:
        student_logits = flattened(student_logits)
        mentors = [flattened(mentor) for mentor in mentors]
        targets = targets.reshape(-1) if targets.shape == shape else flattened(targets)
    row_weight = None
    if weights.row is not None:
        row_weight = _constant(weights.row).reshape(-1)
    if weights.of_class is not None:
        by_class = _of_classes(_constant(weights.of_class), targets, options.ignore_index)
        row_weight = by_class if row_weight is None else row_weight * by_class
    elif row_weight is not None and targets.dim() == 1:
        row_weight = torch.where(targets == options.ignore_index, 0, row_weight)
    return Rows(student_logits, mentors, targets, row_weight, shape)


def flattened(logits: Tensor) -> Tensor:
    """[B, C, d₁, …] as rows [N, C]; a view where the classes lie side by side."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def unflattened(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `flattened`, as a view; ``shape`` is [B, d₁, …]."""
    return rows.reshape(*shape, rows.shape[1]).movedim(-1, 1)


def weighted(losses: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    """Losses of rows [N] times their weights [N], reduced; without weight to share, a mean is 0."""
    losses = losses * row_weight
    if reduction == "none":
        return losses
    return losses.sum() / divisor(row_weight, reduction)


def unreduced(options: LossOptions) -> LossOptions:
    """The same options, for the loss of each row."""
    return replace(options, reduction="none")


def divisor(row_weight: Tensor, reduction: str) -> Tensor | float:
    """What a weighted sum is divided by: for a mean the sum of weights, or 1 where that is 0."""
    if reduction == "sum":
        return 1.0
    total = row_weight.sum()
    return torch.where(total == 0, 1, total)


def _of_classes(class_weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Each row's Σ_c t_c · weight_c, before smoothing; 0 in rows that do not count."""
    if targets.dim() == 2:
        return targets.detach().to(class_weight.dtype) @ class_weight
    named = (targets >= 0) & (targets < len(class_weight))  # of other rows the loss is NaN anyway
    weight = class_weight[torch.where(named, targets, 0).long()]
    return torch.where(targets == ignore_index, 0, weight)


def _constant(weight: Tensor) -> Tensor:
    """Without gradient, and float32 unless float64."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
