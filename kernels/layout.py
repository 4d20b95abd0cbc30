"""How the tensors of a launch lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def alignment(tensors: Sequence[Tensor]) -> int:
    """Largest power of two up to 16 of elements to which every row of these matrices is aligned.

    Strides reach the kernels as multiples of it, for only then does the compiler know how the
    rows are aligned, and loads 16 bytes at a time where it may.
    """
    common = 16
    for tensor in tensors:
        size = tensor.element_size()
        # A tensor on no device would begin where it likes, but for its offset.
        begin = tensor.storage_offset() * size if tensor.is_meta else tensor.data_ptr()
        while tensor.stride(0) % common or begin % (common * size):
            common //= 2
    return common


def unit_strides(
    student: Tensor, mentors: Sequence[Tensor], targets: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The same with unit stride on classes; copies only where it is another."""

    def rows(values: Tensor) -> Tensor:
        return values if values.dim() == 2 and values.stride(1) == 1 else values.contiguous()

    return rows(student), [rows(mentor) for mentor in mentors], rows(targets)
