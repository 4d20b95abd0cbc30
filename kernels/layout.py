"""The memory layout of a launch's tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

MAX_ALIGNMENT = 16
"""Elements."""


def alignment(tensors: Sequence[Tensor]) -> int:
    """The largest power of two of elements, up to 16, to which every row of these is aligned.

    Strides are passed to the kernels as multiples of it, so that the compiler knows the alignment
    of the rows and can load 16 bytes at a time.
    """
    common = MAX_ALIGNMENT
    for tensor in tensors:
        size = tensor.element_size()
        # A meta tensor has no address, only an offset.
        begin = tensor.storage_offset() * size if tensor.is_meta else tensor.data_ptr()
        while tensor.stride(0) % common or begin % (common * size):
            common //= 2
    return common


def unit_strides(
    student: Tensor, mentors: Sequence[Tensor], targets: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The same tensor with unit class stride; copied only if it has another."""

    def rows(values: Tensor) -> Tensor:
        return values if values.dim() == 2 and values.stride(1) == 1 else values.contiguous()

    return rows(student), [rows(mentor) for mentor in mentors], rows(targets)
