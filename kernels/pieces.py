"""Loading rows for ``held.py``: logits and targets in pieces, tiles [R, K, L] of registers."""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import smoothed


@triton.jit
def _inside(rows, column, i, C: tl.constexpr):
    """The mask of piece i; only the piece in which the row ends depends on the columns."""
    if (i + 1) * column.shape[2] <= C:
        return rows & (column >= 0)
    else:
        return rows & (column + i * column.shape[2] < C)


@triton.jit
def rows_of_type(ptrs, strides, row, lane, ALIGN: tl.constexpr, TYPE: tl.constexpr):
    """The row pointers [R, K] of the lanes with this dtype, and the mask of these lanes."""
    size: tl.constexpr = TYPE.primitive_bitwidth // 8
    begin = ptrs[0].to(tl.int64) + (row * ALIGN * strides[0] * size)[:, None] + lane * 0
    mine = (lane == 0) & (ptrs[0].dtype.element_ty == TYPE)
    for k in tl.static_range(1, len(ptrs)):
        here = lane == k
        offset = (row * ALIGN * strides[k] * size)[:, None]
        begin = tl.where(here, ptrs[k].to(tl.int64) + offset, begin)
        mine = mine | (here & (ptrs[k].dtype.element_ty == TYPE))
    begins = begin.to(tl.pointer_type(TYPE))
    return tl.multiple_of(begins, [ALIGN * size, ALIGN * size]), mine


@triton.jit
def _pieces_of_type(
    ptrs,
    strides,
    row,
    lane,
    column,
    n_rows,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
    TYPE: tl.constexpr,
    before,
):
    """The pieces [R, K, L] of the lanes with this dtype; other lanes keep their values."""
    begin, mine = rows_of_type(ptrs, strides, row, lane, ALIGN, TYPE)
    mine = mine & (row < n_rows)[:, None]
    pieces = ()
    for i in tl.static_range(PIECES):
        inside = _inside(mine[:, :, None], column, i, C)
        at = column + i * column.shape[2]
        z = tl.load(begin[:, :, None] + at, mask=inside, other=-float("inf")).to(tl.float32)
        if len(before) > 0:
            z = tl.where(mine[:, :, None], z, before[i])
        pieces = pieces + (z,)
    return pieces


@triton.jit
def load_pieces(
    ptrs,  # the student's first, as the strides
    strides,
    row,  # [R]
    lane,  # [1, K]
    column,  # [1, 1, L], of the first piece
    n_rows,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
    MIXED: tl.constexpr,
):
    """PIECES tiles [R, K, L] of float32, −inf outside the row."""
    if MIXED:
        pieces = ()
        for i in tl.static_range(3):
            pieces = _pieces_of_type(
                ptrs,
                strides,
                row,
                lane,
                column,
                n_rows,
                C,
                PIECES,
                ALIGN,
                (tl.float32, tl.float16, tl.bfloat16)[i],
                pieces,
            )
    else:
        pieces = _pieces_of_type(
            ptrs,
            strides,
            row,
            lane,
            column,
            n_rows,
            C,
            PIECES,
            ALIGN,
            ptrs[0].dtype.element_ty,
            (),
        )
    return pieces


@triton.jit
def load_student(
    ptrs,
    strides,
    row,
    lane,
    column,
    n_rows,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The student's row in every lane: PIECES tiles [R, K, L], −inf outside the row."""
    begin = (row * ALIGN * strides[0])[:, None, None] + (lane * 0)[:, :, None]
    pieces = ()
    for i in tl.static_range(PIECES):
        inside = _inside((row < n_rows)[:, None, None], column, i, C)
        at = column + i * column.shape[2]
        z = tl.load(ptrs[0] + begin + at, mask=inside, other=-float("inf")).to(tl.float32)
        pieces = pieces + (z,)
    return pieces


@triton.jit
def load_targets(
    labels,
    row,
    lane,
    column,
    n_rows,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The targets of rows: valid [R], out_of_range [R] (an invalid class index), the target class
    [R] (0 if there is none), t in pieces [R, 1 or K, L] (none if it is one class), and Σ_c t(c)
    [R, 1].
    """
    target_ptr, target_stride, label_smoothing, ignore_index = labels
    in_range = row < n_rows
    pieces = ()
    if target_stride is None:
        index = tl.load(target_ptr + row, mask=in_range, other=0).to(tl.int64)
        valid = in_range & (index != ignore_index)
        out_of_range = (index < 0) | (index >= C)
        target = tl.where(out_of_range, 0, index).to(tl.int32)
        t_sum = tl.full([row.shape[0], 1], 1.0, tl.float32)
        if label_smoothing is not None:
            for i in tl.static_range(PIECES):
                inside = _inside(in_range[:, None, None], column, i, C)
                t = tl.where(column + i * column.shape[2] == target[:, None, None], 1.0, 0.0)
                pieces = pieces + (smoothed(t, label_smoothing, inside, C),)
    else:
        valid = in_range
        out_of_range = row < 0
        begin = (row * ALIGN * target_stride)[:, None, None] + (lane * 0)[:, :, None]
        best = begin * 0.0 - float("inf")
        best_at = (begin * 0 + C - 1).to(tl.int32)
        t_sums = begin * 0.0
        for i in tl.static_range(PIECES):
            inside = _inside(in_range[:, None, None], column, i, C)
            at = column + i * column.shape[2]
            t = tl.load(target_ptr + begin + at, mask=inside, other=0.0).to(tl.float32)
            best_at = tl.where(inside & (t > best), at, best_at)
            best = tl.where(inside, tl.maximum(best, t), best)
            t = smoothed(t, label_smoothing, inside, C)
            t_sums += t
            pieces = pieces + (t,)
        largest = tl.max(best, 2)
        at = tl.min(tl.where(best == largest[:, :, None], best_at, C - 1), 2)
        target = tl.max(at, 1)
        t_sum = tl.max(tl.sum(t_sums, 2), 1)[:, None]
    return valid, out_of_range, target, pieces, t_sum
