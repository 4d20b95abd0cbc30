"""Autograd's backward of the loss: each row's gradient times the incoming gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_lines", "n_columns", "n_classes"])
def scale_rows_kernel(
    grad_ptr,  # lines of numbers: rows [B, C]; or, of dense [B, C, P], the positions of a class
    factor_ptr,  # one number, or one a row
    weight_ptr,  # one a row, or None for 1
    count_ptr,  # one number, or None for 1
    out_ptr,
    factor_stride,  # None for one number
    n_lines,
    n_columns,  # in units of ALIGN
    n_classes,  # C of dense gradients, or None
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out = grad · factor[row] · weight[row] / count, in float32."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    length = n_columns * ALIGN
    there = (line < n_lines)[:, None]
    inside = there & (column < length)
    row = line[:, None]
    if n_classes is not None:
        row = row // n_classes * length + column
        there = inside
    if factor_stride is None:
        factor = tl.load(factor_ptr).to(tl.float32)
    else:
        factor = tl.load(factor_ptr + row * factor_stride, mask=there, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + row, mask=there, other=0.0)
    if count_ptr is not None:
        factor /= tl.load(count_ptr)
    offsets = line[:, None] * length + column
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (grad * factor).to(out_ptr.dtype.element_ty), mask=inside)
