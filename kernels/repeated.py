"""Calls of one kind: later launches repeat the first, without a new plan or a kernel lookup.

They bypass Triton's own launcher, which takes longer than everything else that a call does on the
host: it describes every argument to find the kernel that it has compiled for them.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from classroomkd.kernels import launch


class Launches:
    """The functions of ``launch.py`` for calls of one kind.

    Calls are of one kind if they have the same options and want the same, and their tensors have
    the same dtypes, device, shapes, strides and alignment, up to `MAX_ALIGNMENT` elements of the
    widest dtype: no less than the 16 bytes that Triton looks at. PyTorch aligns new tensors so.
    """

    def __init__(self) -> None:
        self.confidence_sums = partial(launch.confidence_sums, repeated=launch.Repeated())
        self.classroom_loss_and_grad = partial(
            launch.classroom_loss_and_grad, repeated=launch.Repeated()
        )
        self._scaled = launch.Repeated()

    def scale_rows(
        self, grad: Tensor, factor: Tensor, row_weight: Tensor | None, count: Tensor | None
    ) -> Tensor:
        """As there; repeated for the gradients of these calls and the usual factor, one number."""
        addresses = grad.data_ptr() | factor.data_ptr() | (0 if count is None else count.data_ptr())
        usual = row_weight is None and factor.dim() == 0 and addresses % 16 == 0
        return launch.scale_rows(grad, factor, row_weight, count, self._scaled if usual else None)
