"""The fused loss as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from classroomkd.loss.classroom_report import ClassroomReport, RowReport
from classroomkd.loss.fused import fused_loss, fused_loss_and_grad
from classroomkd.loss.options import LossOptions, OptionValues
from classroomkd.loss.rows import LossWeights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ClassroomLoss(nn.Module):
    """`fused_classroom_loss` with its options fixed.

    Args:
        mentor_weight: a number ≥ 0 or "auto", as for `classroom_loss`; or M weights g_m, a sequence
            or a tensor [M], which become a buffer: they move with the module and are saved with it.
        class_weight: a sequence or a tensor [C], which become a buffer likewise.
        process_group: see `classroom_loss`.
        **options: the other options of `fused_classroom_loss`, from ``temperature`` to
            ``reduction``, checked at once.

    Raises:
        ValueError, TypeError: an option that does not exist or is out of its range.

    """

    mentor_weight: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        mentor_weight: Sequence[float] | Tensor | float | str | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
        process_group: ProcessGroup | None = None,
        **options: Unpack[OptionValues],
    ) -> None:
        super().__init__()
        weights = None
        if not isinstance(mentor_weight, float | int | str | None):
            weights, mentor_weight = _one_each("mentor_weight", "M", mentor_weight), None
        self.options = LossOptions(mentor_weight=mentor_weight, **options)
        self.process_group = process_group
        self.register_buffer("mentor_weight", weights)
        if class_weight is not None:
            class_weight = _one_each("class_weight", "C", class_weight)
        self.register_buffer("class_weight", class_weight)

    @overload
    def forward(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        return_report: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        return_report: Literal[True],
    ) -> tuple[Tensor, ClassroomReport]: ...

    @overload
    def forward(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        return_report: Literal["rows"],
    ) -> tuple[Tensor, RowReport]: ...

    def forward(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        return_report: bool | Literal["rows"] = False,
    ) -> Tensor | tuple[Tensor, ClassroomReport | RowReport]:
        """See `fused_classroom_loss`."""
        loss, report = fused_loss(
            student_logits,
            mentor_logits,
            targets,
            LossWeights(self.mentor_weight, self.class_weight, row_weight),
            self.options,
            return_report,
            self.process_group,
        )
        return loss if report is None else (loss, report)

    if TYPE_CHECKING:
        __call__ = forward

    @overload
    def loss_and_grad(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
        return_report: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def loss_and_grad(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
        return_report: Literal[True],
    ) -> tuple[Tensor, Tensor, ClassroomReport]: ...

    @overload
    def loss_and_grad(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
        return_report: Literal["rows"],
    ) -> tuple[Tensor, Tensor, RowReport]: ...

    def loss_and_grad(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
        return_report: bool | Literal["rows"] = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ClassroomReport | RowReport]:
        """See `fused_classroom_loss_and_grad`."""
        loss, grad, report = fused_loss_and_grad(
            student_logits,
            mentor_logits,
            targets,
            LossWeights(self.mentor_weight, self.class_weight, row_weight),
            scale,
            self.options,
            return_report,
            self.process_group,
        )
        return (loss, grad) if report is None else (loss, grad, report)

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())


def _one_each(name: str, dimension: str, given: Sequence[float] | Tensor) -> Tensor:
    weights = torch.as_tensor(given, dtype=torch.float32).detach().clone()
    if weights.dim() != 1:
        raise ValueError(f"{name} must have shape [{dimension}], got {list(weights.shape)}")
    for index, weight in enumerate(weights.tolist()):
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"{name} must be finite and not negative, got {weight} at index {index}"
            )
    return weights
