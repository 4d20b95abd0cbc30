"""What the public functions return, for type checkers: it depends on ``return_report``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack, cast, overload

from torch import Tensor

from classroomkd.loss.classroom_report import ClassroomReport, RowReport
from classroomkd.loss.options import OptionValues

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LossFunction(Protocol):
    """`classroom_loss` and `fused_classroom_loss`."""

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        mentor_weight: Tensor | float | str | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        return_report: Literal[False] = False,
        **options: Unpack[OptionValues],
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        mentor_weight: Tensor | float | str | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        return_report: Literal[True],
        **options: Unpack[OptionValues],
    ) -> tuple[Tensor, ClassroomReport]: ...

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        mentor_weight: Tensor | float | str | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        return_report: Literal["rows"],
        **options: Unpack[OptionValues],
    ) -> tuple[Tensor, RowReport]: ...

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        mentor_weight: Tensor | float | str | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        return_report: bool,
        **options: Unpack[OptionValues],
    ) -> Tensor | tuple[Tensor, ClassroomReport]: ...


class LossAndGradFunction(Protocol):
    """`fused_classroom_loss_and_grad`."""

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        mentor_weight: Tensor | float | str | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        return_report: Literal[False] = False,
        **options: Unpack[OptionValues],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        mentor_weight: Tensor | float | str | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        return_report: Literal[True],
        **options: Unpack[OptionValues],
    ) -> tuple[Tensor, Tensor, ClassroomReport]: ...

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        mentor_weight: Tensor | float | str | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        return_report: Literal["rows"],
        **options: Unpack[OptionValues],
    ) -> tuple[Tensor, Tensor, RowReport]: ...

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        mentor_logits: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        mentor_weight: Tensor | float | str | None = None,
        class_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        return_report: bool,
        **options: Unpack[OptionValues],
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ClassroomReport]: ...


def loss_function(function: Callable[..., Any]) -> LossFunction:
    """Declare that a function is one; it is returned as it is."""
    return cast(LossFunction, function)


def loss_and_grad_function(function: Callable[..., Any]) -> LossAndGradFunction:
    """Declare that a function is one; it is returned as it is."""
    return cast(LossAndGradFunction, function)
