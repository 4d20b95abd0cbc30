"""The first sweep over rows in tiles: targets, confidences, maxima.

The running maximum of `scan_row` rescales what was summed before it:

    S ← S · exp(max_old − max_new) + Σ_tile exp(z − max_new).
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    LN2,
    LOG2E,
    floored,
    is_last_program,
    load_column,
    load_tile,
    smoothed,
    store_row_stat,
    sum_row_stats,
)


@triton.jit
def load_targets(
    target_ptr,
    target_stride,
    label_smoothing,
    row,
    column,
    inside,
    target,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """t [1, BLOCK_C] of one tile."""
    if target_stride is None:
        t = tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    else:
        offsets = (row * ALIGN)[:, None] * target_stride + column[None, :]
        t = tl.load(target_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return smoothed(t, label_smoothing, inside, C)


@triton.jit
def scan_targets(
    target_ptr,
    target_stride,
    label_smoothing,
    ignore_index,
    row,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Whether the row counts, whether it names no class, its target class (0 where there is none),
    and Σ_c t(c); [1].
    """
    if target_stride is None:
        index = tl.load(target_ptr + row).to(tl.int64)
        valid = index != ignore_index
        out_of_range = (index < 0) | (index >= C)
        target = tl.where(out_of_range, 0, index).to(tl.int32)
        t_sum = tl.zeros([1], tl.float32) + 1.0
    else:
        valid = row >= 0
        out_of_range = row < 0
        # Column by column: Triton 3.7 fails to compile loops that carry a tile's sum or maximum on.
        best = tl.full([1, BLOCK_C], -float("inf"), tl.float32)
        at = tl.full([1, BLOCK_C], C, tl.int32)
        t_sums = tl.zeros([1, BLOCK_C], tl.float32)
        for start in range(0, C, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = (column < C)[None, :]
            offsets = (row * ALIGN)[:, None] * target_stride + column[None, :]
            t = tl.load(target_ptr + offsets, mask=inside, other=-float("inf")).to(tl.float32)
            at = tl.where(t > best, column[None, :], at)
            best = tl.maximum(best, t)
            t_sums += tl.where(inside, smoothed(t, label_smoothing, inside, C), 0.0)
        target = tl.min(tl.where(best == tl.max(best, 1)[:, None], at, C - 1), 1)
        t_sum = tl.sum(t_sums, 1)
    return valid, out_of_range, target, t_sum


@triton.jit
def scan_row(
    ptr,
    stride,
    target_ptr,
    target_stride,
    label_smoothing,
    row,
    target,
    t_sum,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """ℓ, max z, Σ exp(z − max z) and the target class's logit of a row; each [1]."""
    z_max = tl.full([1], -float("inf"), tl.float32)
    shift = tl.zeros([1], tl.float32)  # what stands for max z: 0 while every class is ruled out
    e_sums = tl.zeros([1, BLOCK_C], tl.float32)
    picked = tl.zeros([1, BLOCK_C], tl.float32)  # t · (z − max z), added up over the tiles so far
    seen = tl.zeros([1, BLOCK_C], tl.float32)  # t, likewise
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = (column < C)[None, :]
        z = load_tile(ptr, stride, row, column, inside, ALIGN)
        new_max = tl.maximum(z_max, tl.max(z, 1))
        new_shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        lower = tl.where(z_max == -float("inf"), 0.0, shift - new_shift)[:, None]
        d = z - new_shift[:, None]
        e_sums = e_sums * tl.exp2(lower * LOG2E) + tl.exp2(d * LOG2E)
        if (target_stride is not None) or (label_smoothing is not None):
            t = load_targets(
                target_ptr,
                target_stride,
                label_smoothing,
                row,
                column,
                inside,
                target,
                C,
                ALIGN,
            )
            picked += tl.where(seen > 0.0, seen * lower, 0.0) + tl.where(t > 0.0, t * d, 0.0)
            seen += t
        z_max = new_max
        shift = new_shift
    e_sum = tl.sum(e_sums, 1)
    z_target = load_column(ptr, stride, row, target, row + 1, ALIGN)
    if (target_stride is None) and (label_smoothing is None):
        ell = z_target - z_max - tl.log2(e_sum) * LN2
    else:
        ell = tl.sum(picked, 1) - t_sum * tl.log2(e_sum) * LN2
    # A row without any class has no distribution; single-pass, −inf − −inf says so.
    ell = tl.where(z_max == -float("inf"), float("nan"), ell)
    return ell, z_max, e_sum, z_target


@triton.jit
def row_max(ptr, stride, row, C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr):
    """max z of a row, [1]; the tiles are joined column by column, as in `scan_targets`."""
    z_max = tl.full([1, BLOCK_C], -float("inf"), tl.float32)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = (column < C)[None, :]
        z_max = tl.maximum(z_max, load_tile(ptr, stride, row, column, inside, ALIGN))
    return tl.max(z_max, 1)


@triton.jit(do_not_specialize=["ignore_index"])
def tiled_confidence_kernel(
    student_ptr,  # [B, C] of any row stride
    mentor_ptrs,  # M of [B, C], likewise
    target_ptr,  # class indices [B], or probabilities [B, C]
    ell_ptr,  # float32 [M + 2, B], scratch
    sums_ptr,  # float32 [M + 2]
    counter_ptr,  # int32, 0
    student_stride,  # of rows, in units of ALIGN elements
    mentor_strides,  # M, likewise
    target_stride,  # likewise; None for class indices
    n_rows,  # B
    label_smoothing,  # or None
    ignore_index: tl.int64,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`confidence_kernel` for one row per program."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    valid, out_of_range, target, t_sum = scan_targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, C, BLOCK_C, ALIGN
    )
    M: tl.constexpr = len(mentor_ptrs)
    for k in tl.static_range(M + 1):
        if k == 0:
            ptr, stride = student_ptr, student_stride
        else:
            ptr, stride = mentor_ptrs[k - 1], mentor_strides[k - 1]
        ell, _, _, _ = scan_row(
            ptr,
            stride,
            target_ptr,
            target_stride,
            label_smoothing,
            row,
            target,
            t_sum,
            C,
            BLOCK_C,
            ALIGN,
        )
        ell = tl.where(out_of_range, float("nan"), floored(ell))
        store_row_stat(ell_ptr, k, row, n_rows, tl.where(valid, ell, 0.0))
    store_row_stat(ell_ptr, M + 1, row, n_rows, valid.to(tl.float32))
    if is_last_program(counter_ptr):
        stat = tl.arange(0, BLOCK_STATS)
        sums = sum_row_stats(ell_ptr, n_rows, M + 2, BLOCK_STATS, BLOCK_R)
        tl.store(sums_ptr + stat, sums, mask=stat < M + 2)
