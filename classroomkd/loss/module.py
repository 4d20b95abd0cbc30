"""The fused loss as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from classroomkd.loss.fused import fused_classroom_loss, fused_classroom_loss_and_grad
from classroomkd.loss.options import LossOptions
from classroomkd.loss.report import ClassroomReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ClassroomLoss(nn.Module):
    """`fused_classroom_loss` with its options fixed.

    Args:
        mentor_weight: M further weights g_m, a sequence or a tensor [M]. A buffer: it moves with
            the module and is saved with it.
        process_group: see `classroom_loss`.
        **options: the other options of `fused_classroom_loss`, from ``temperature`` to
            ``reduction``, checked at once.

    Raises:
        ValueError, TypeError: an option that does not exist or is out of its range.

    """

    mentor_weight: Tensor | None

    def __init__(
        self,
        *,
        mentor_weight: Sequence[float] | Tensor | None = None,
        process_group: ProcessGroup | None = None,
        **options: float | str | int | None,
    ) -> None:
        super().__init__()
        self.options = LossOptions(**options)
        self.process_group = process_group
        if mentor_weight is not None:
            mentor_weight = torch.as_tensor(mentor_weight, dtype=torch.float32).detach().clone()
            if mentor_weight.dim() != 1:
                raise ValueError(
                    f"mentor_weight must have shape [M], got {list(mentor_weight.shape)}"
                )
        self.register_buffer("mentor_weight", mentor_weight)

    def forward(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        return_report: bool = False,
    ) -> Tensor | tuple[Tensor, ClassroomReport]:
        """See `fused_classroom_loss`."""
        return fused_classroom_loss(
            student_logits,
            mentor_logits,
            targets,
            mentor_weight=self.mentor_weight,
            process_group=self.process_group,
            return_report=return_report,
            **vars(self.options),
        )

    def loss_and_grad(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        scale: Tensor | None = None,
        return_report: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ClassroomReport]:
        """See `fused_classroom_loss_and_grad`."""
        return fused_classroom_loss_and_grad(
            student_logits,
            mentor_logits,
            targets,
            mentor_weight=self.mentor_weight,
            scale=scale,
            process_group=self.process_group,
            return_report=return_report,
            **vars(self.options),
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())
