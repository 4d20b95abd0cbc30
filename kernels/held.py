"""Rows in registers: student and mentors are lanes of one tile, [R, K, L], for few classes.

A row is cut into pieces of L columns, of which a thread has four (a 16-byte load of float32), and
K networks lie side by side in a warp's threads. So a sum over columns is mostly within a thread,
and what is done once a network is done in one thread, not in each. The student is lane 0: its
softmax costs nothing extra, and its cross-entropy's gradient is that of one more lesson, at τ = 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    LOG2E,
    cross_terms,
    exponents,
    log_confidence,
    smoothed,
)


@triton.jit
def _inside(rows, column, i, C: tl.constexpr):
    """The mask of piece i; only a piece that the row ends in needs to look at the columns."""
    if (i + 1) * column.shape[2] <= C:
        return rows & (column >= 0)
    else:
        return rows & (column + i * column.shape[2] < C)


@triton.jit
def _rows_of_type(
    student_ptr,
    mentor_ptrs,
    student_stride,
    mentor_strides,
    row,
    lane,
    ALIGN: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Where the rows of the lanes with this type begin [R, K], and which lanes they are."""
    size: tl.constexpr = TYPE.primitive_bitwidth // 8
    begin = student_ptr.to(tl.int64) + (row * ALIGN * student_stride * size)[:, None] + lane * 0
    mine = (lane == 0) & (student_ptr.dtype.element_ty == TYPE)
    for m in tl.static_range(len(mentor_ptrs)):
        here = lane == m + 1
        offset = (row * ALIGN * mentor_strides[m] * size)[:, None]
        begin = tl.where(here, mentor_ptrs[m].to(tl.int64) + offset, begin)
        mine = mine | (here & (mentor_ptrs[m].dtype.element_ty == TYPE))
    begins = begin.to(tl.pointer_type(TYPE))
    return tl.multiple_of(begins, [ALIGN * size, ALIGN * size]), mine


@triton.jit
def _pieces_of_type(
    student_ptr,
    mentor_ptrs,
    student_stride,
    mentor_strides,
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
    """The pieces [R, K, L] of the lanes with this type; in others what was there before."""
    begin, mine = _rows_of_type(
        student_ptr, mentor_ptrs, student_stride, mentor_strides, row, lane, ALIGN, TYPE
    )
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
    student_ptr,
    mentor_ptrs,
    student_stride,
    mentor_strides,
    row,  # [R]
    lane,  # [1, K]
    column,  # [1, 1, L], of the first piece
    n_rows,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
    MIXED: tl.constexpr,
):
    """PIECES tiles [R, K, L] of float32, −inf where there is nothing."""
    if MIXED:
        pieces = ()
        for i in tl.static_range(3):
            pieces = _pieces_of_type(
                student_ptr,
                mentor_ptrs,
                student_stride,
                mentor_strides,
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
            student_ptr,
            mentor_ptrs,
            student_stride,
            mentor_strides,
            row,
            lane,
            column,
            n_rows,
            C,
            PIECES,
            ALIGN,
            student_ptr.dtype.element_ty,
            (),
        )
    return pieces


@triton.jit
def load_student(
    ptr,
    stride,
    row,
    lane,
    column,
    n_rows,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The student's row beside each lane: PIECES tiles [R, K, L], −inf outside."""
    begin = (row * ALIGN * stride)[:, None, None] + (lane * 0)[:, :, None]
    pieces = ()
    for i in tl.static_range(PIECES):
        inside = _inside((row < n_rows)[:, None, None], column, i, C)
        at = column + i * column.shape[2]
        z = tl.load(ptr + begin + at, mask=inside, other=-float("inf")).to(tl.float32)
        pieces = pieces + (z,)
    return pieces


@triton.jit
def load_targets(
    target_ptr,
    target_stride,
    label_smoothing,
    ignore_index,
    row,
    lane,
    column,
    n_rows,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The targets of rows: valid [R], out_of_range [R] (a class index that names no class), the
    target class [R] (0 where there is none), t in pieces [R, 1 or K, L] (none where it is one
    class), and Σ_c t(c) [R, 1].
    """
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


@triton.jit
def held_confidences(
    pieces, ts, target, t_sum, lane, column, M: tl.constexpr, ONE_CLASS: tl.constexpr
):
    """Of all lanes [R, K]: ℓ (−inf kept), max z, Σ exp(z − max z), z − max z of the target class;
    and the pieces of z − max z.
    """
    largest = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        largest = tl.maximum(largest, pieces[i])
    maxima = tl.max(largest, 2)
    shift = tl.where(lane <= M, maxima, 0.0)[:, :, None]  # lanes without a network stay −inf
    e_sums = tl.zeros_like(largest)
    picked = tl.zeros_like(largest)
    at_target = tl.zeros_like(largest)
    piece = (target // column.shape[2])[:, None, None]
    ds = ()
    for i in tl.static_range(len(pieces)):
        d = pieces[i] - shift
        e_sums += tl.exp2(d * LOG2E)
        at_target = tl.where(piece == i, d, at_target)
        if not ONE_CLASS:
            picked += tl.where(ts[i] > 0.0, ts[i] * d, 0.0)
        ds = ds + (d,)
    e_sum = tl.sum(e_sums, 2)
    here = target[:, None, None] % column.shape[2] == column
    of_target = tl.sum(tl.where(here, at_target, 0.0), 2)
    if ONE_CLASS:
        ell = log_confidence(of_target, t_sum, e_sum)
    else:
        ell = log_confidence(tl.sum(picked, 2), t_sum, e_sum)
    return tl.where(lane <= M, ell, 0.0), maxima, e_sum, of_target, ds


@triton.jit
def held_lessons(ds, students, s_max, tau_m, tau_s, SAME_TAU: tl.constexpr):
    """The sums of e_m, of e_s and of the cross terms of each lane [R, K], and the pieces of e_m and
    e_s.
    """
    scale_m = (1.0 / tau_m * LOG2E)[:, :, None]
    scale_s = (1.0 / tau_s * LOG2E)[:, :, None]
    sums_m = tl.zeros_like(ds[0])
    sums_s = tl.zeros_like(ds[0])
    crosses = tl.zeros_like(ds[0])
    es_m = ()
    es_s = ()
    for i in tl.static_range(len(ds)):
        d_s = students[i] - s_max[:, :, None]
        e_m = tl.exp2(exponents(ds[i], scale_m))
        e_s = tl.exp2(exponents(d_s, scale_s))
        sums_m += e_m
        sums_s += e_s
        crosses += cross_terms(e_m, ds[i], d_s, scale_m, scale_s, SAME_TAU)
        es_m = es_m + (e_m,)
        es_s = es_s + (e_s,)
    return tl.sum(sums_m, 2), tl.sum(sums_s, 2), tl.sum(crosses, 2), es_m, es_s


@triton.jit
def store_held_gradient(
    grad_ptr,
    es_m,
    es_s,
    coef_m,  # [R, K], as is coef_s
    coef_s,
    target_ptr,
    target_stride,
    label_smoothing,
    row,
    target,
    lane,
    column,
    task,  # [R, 1]
    factor,
    valid,  # [R]
    nonfinite,
    n_rows,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Σ_k (coef_s · e_s − coef_m · e_m) − a_s · t, times the factor.

    Each sum over lanes comes out in all of them; lane i takes that of piece i, so that the rest is
    done once a column and is one store.
    """
    K: tl.constexpr = lane.shape[1]
    PIECES: tl.constexpr = len(es_m)
    for first in tl.static_range(0, PIECES, K):
        grad = tl.zeros_like(es_m[0])
        for i in tl.static_range(first, PIECES if first + K > PIECES else first + K):
            lessons = es_s[i] * coef_s[:, :, None] - es_m[i] * coef_m[:, :, None]
            here = (lane == i - first)[:, :, None]
            grad = tl.where(here, tl.sum(lessons, 1)[:, None, :], grad)
        at = column + (lane + first)[:, :, None] * column.shape[2]
        inside = (row < n_rows)[:, None, None] & (at < C)
        if target_stride is None:
            t = tl.where(at == target[:, None, None], 1.0, 0.0)
        else:
            begin = (row * ALIGN * target_stride)[:, None, None]
            t = tl.load(target_ptr + begin + at, mask=inside, other=0.0).to(tl.float32)
        grad -= smoothed(t, label_smoothing, inside, C) * task[:, :, None]
        grad = tl.where(nonfinite[:, None, None], float("nan"), grad * factor)
        grad = tl.where(valid[:, None, None], grad, 0.0).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + (row * C)[:, None, None] + at, grad, mask=inside)
