"""Targets as the loss by definition takes them: t of its formulas, and which rows count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from classroomkd.loss.options import LossOptions


class Target(NamedTuple):
    """The targets in the form the formulas need."""

    class_index: Tensor  # [B] int64: the target class, 0 where there is none
    probabilities: Tensor | None  # [B, C], or None for class indices
    smoothing: float
    valid: Tensor  # [B] bool: not ignore_index
    out_of_range: Tensor  # [B] bool: a class index that names no class

    def expectation(self, values: Tensor) -> Tensor:
        """Σ_c t(c) · values(c) over the last dimension of values [..., B, C]; 0 · −inf is 0."""
        if self.probabilities is None:
            index = self.class_index[:, None].expand(*values.shape[:-1], 1)
            picked = values.gather(-1, index).squeeze(-1)
            if self.smoothing == 0:
                return picked
            if self.smoothing == 1:
                return values.mean(-1)  # 0 · −inf is 0
            return (1 - self.smoothing) * picked + self.smoothing * values.mean(-1)
        t = (1 - self.smoothing) * self.probabilities + self.smoothing / values.shape[-1]
        return torch.where(t > 0, t * values, 0).sum(-1)


def prepare_targets(
    targets: Tensor, n_classes: int, options: LossOptions, dtype: torch.dtype
) -> Target:
    """Split the targets into class, distribution and validity.

    Raises:
        ValueError: on the CPU, unless compiled, a class index outside 0 … C − 1 that is not
            ``ignore_index``.

    """
    if targets.dim() == 2:
        everywhere = torch.ones_like(targets[:, 0], dtype=torch.bool)
        return Target(
            class_index=targets.argmax(1),
            probabilities=targets.detach().to(dtype),
            smoothing=options.label_smoothing,
            valid=everywhere,
            out_of_range=~everywhere,
        )
    targets = targets.to(torch.int64)
    valid = targets != options.ignore_index
    out_of_range = valid & ((targets < 0) | (targets >= n_classes))
    # On a GPU looking costs a sync, and a compiled graph cannot depend on values.
    looks = targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and out_of_range.any():
        row = int(out_of_range.nonzero()[0, 0])
        raise ValueError(
            f"targets must be class indices from 0 to {n_classes - 1} or "
            f"ignore_index={options.ignore_index}, got {int(targets[row])} in row {row}"
        )
    index = torch.where(valid & ~out_of_range, targets, 0)
    return Target(index, None, options.label_smoothing, valid, out_of_range)
