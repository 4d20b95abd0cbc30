"""Autograd's backward of the loss: each row's gradient times the incoming gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows"])
def scale_rows_kernel(
    grad_ptr,
    factor_ptr,
    count_ptr,
    out_ptr,
    factor_stride,
    n_rows: tl.int32,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out = grad · factor[row] / count, in float32. ``count_ptr`` or None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = row < n_rows
    inside = in_range[:, None] & (column < C)[None, :]
    factor = tl.load(factor_ptr + row * factor_stride, mask=in_range, other=0.0).to(tl.float32)
    if count_ptr is not None:
        factor /= tl.load(count_ptr)
    offsets = row[:, None] * C + column[None, :]
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + offsets,
        (grad * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=inside,
    )
