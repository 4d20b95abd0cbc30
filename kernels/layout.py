"""The memory layout of a launch's tensors.

Logits are rows [B, C], or dense [B, C, P], of which every position is a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_ALIGNMENT = 16
"""Elements."""
MAX_CLASSES_IN_PLACE = 256
"""Dense logits with more classes, in memory of that order, are copied to rows."""


def in_place(student: Tensor) -> bool:
    """Whether a batch with these logits is read along its positions, where it lies.

    So it is if adjacent positions are adjacent in memory, and not the classes of one.
    """
    return student.dim() == 3 and student.shape[1] <= MAX_CLASSES_IN_PLACE and _by_position(student)


def _by_position(values: Tensor) -> bool:
    n_positions = values.shape[2]
    return n_positions > 1 and values.stride(2) == 1 and values.stride(1) == n_positions


def flattened(values: Tensor) -> Tensor:
    """[B, C] as it is, [B, C, P] as rows [B · P, C]; a view where classes lie side by side."""
    return values if values.dim() == 2 else values.transpose(1, 2).reshape(-1, values.shape[1])


def new_gradient(student: Tensor) -> Tensor:
    """Memory for the gradient of logits, of their shape: in place, or rows side by side."""
    if student.dim() == 2 or in_place(student):
        return torch.empty_like(student, memory_format=torch.contiguous_format)
    n_images, n_classes, n_positions = student.shape
    return student.new_empty(n_images, n_positions, n_classes).transpose(1, 2)


def as_read(
    student: Tensor, mentors: Sequence[Tensor], targets: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The batch as a launch reads it: dense [B, C, P] in place, else rows of unit class stride.

    Copied is what lies in another order than that.
    """
    dense = in_place(student)

    def laid_out(values: Tensor) -> Tensor:
        if dense:
            return values if _by_position(values) else values.contiguous()
        rows = flattened(values)
        return rows if rows.stride(1) == 1 else rows.contiguous()

    soft = targets.dim() == student.dim()
    targets = laid_out(targets) if soft else targets.contiguous()
    return laid_out(student), [laid_out(mentor) for mentor in mentors], targets


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
