"""Calls of one kind, whose later launches repeat the first: no plan is made, nothing is looked up.

They pass by Triton's own launcher, which takes several times longer than all else that a call does
on the host: it describes every argument to find the kernel that it has compiled for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from classroomkd.kernels import launch

if TYPE_CHECKING:
    from classroomkd.loss.options import LossOptions


class Launches:
    """The functions of ``launch.py`` for calls of one kind.

    Calls are of one kind if they have the same options and want the same, and their tensors have
    the same dtypes, device, shapes and strides, and addresses with the same remainder by 128 bytes.
    What PyTorch allocates for the results is aligned to more than the 16 bytes that Triton asks.
    """

    def __init__(self) -> None:
        self._sums, self._loss, self._scaled = (launch.Repeated() for _ in range(3))

    def confidence_sums(
        self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor, options: LossOptions
    ) -> Tensor:
        """As there."""
        return launch.confidence_sums(student, mentors, targets, options, self._sums)

    def classroom_loss_and_grad(
        self,
        student: Tensor,
        mentors: Sequence[Tensor],
        targets: Tensor,
        mentor_weight: Tensor | None,
        ell_sums: Tensor | None,
        options: LossOptions,
        **wanted: Any,
    ) -> launch.LaunchOutputs:
        """As there."""
        return launch.classroom_loss_and_grad(
            student, mentors, targets, mentor_weight, ell_sums, options, self._loss, **wanted
        )

    def scale_rows(self, grad: Tensor, factor: Tensor, count: Tensor | None) -> Tensor:
        """As there; repeated for the gradients of these calls and the usual factor, one number."""
        addresses = grad.data_ptr() | factor.data_ptr() | (0 if count is None else count.data_ptr())
        usual = factor.dim() == 0 and addresses % 16 == 0
        return launch.scale_rows(grad, factor, count, self._scaled if usual else None)
