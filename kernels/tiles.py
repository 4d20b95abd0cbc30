"""Rows in sweeps, as in ``swept.py``, with all networks in one tile, for many mentors.

A tile is [1, K, B]: B columns of all networks, which a thread has all of, V adjacent ones of each.
So a step has one load of logits, and one operation where ``swept.py`` has one per network. With
many mentors the compiler takes much less time, since its time for a load grows with the square of
the number of operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import LOG2E, log_confidence, smoothed
from classroomkd.kernels.pieces import rows_of_type
from classroomkd.kernels.positions import finished_gradient, gradient_terms, kd_sum_terms


@triton.jit
def tile_begins(ptrs, strides, row, lane, ALIGN: tl.constexpr, MIXED: tl.constexpr):
    """`rows_of_type` of each dtype there may be, pointers and masks in turn."""
    begins = ()
    if MIXED:
        for i in tl.static_range(3):
            begins = begins + rows_of_type(
                ptrs, strides, row, lane, ALIGN, (tl.float32, tl.float16, tl.bfloat16)[i]
            )
    else:
        begins = rows_of_type(ptrs, strides, row, lane, ALIGN, ptrs[0].dtype.element_ty)
    return begins


@triton.jit
def _logits(begins, wanted, column, C: tl.constexpr):
    """Columns [1, 1, B] of the networks wanted [1, K], as float32 [1, K, B]; −inf elsewhere."""
    inside = wanted[:, :, None] & (column < C)
    z = tl.full([1, wanted.shape[1], column.shape[2]], -float("inf"), tl.float32)
    for i in tl.static_range(0, len(begins), 2):
        mask = inside & begins[i + 1][:, :, None]
        of_type = tl.load(begins[i][:, :, None] + column, mask=mask, other=-float("inf"))
        if len(begins) == 2:
            z = of_type.to(tl.float32)
        else:
            z = tl.where(mask, of_type.to(tl.float32), z)
    return z


@triton.jit
def _targets(labels, target, column, C: tl.constexpr, SOFT: tl.constexpr):
    """t of columns [1, 1, B] before and after smoothing; 0 beyond the last."""
    target_ptr, label_smoothing, _ = labels
    inside = column < C
    if SOFT:
        t = tl.load(target_ptr + column, mask=inside, other=0.0).to(tl.float32)
    else:
        t = tl.where(column == target, 1.0, 0.0)
    return t, smoothed(t, label_smoothing, inside, C)


@triton.jit
def _of_threads(tile, V: tl.constexpr):
    """A tile [1, K, B] as [1, K, L, V], where a thread has V adjacent columns."""
    return tl.reshape(tile, [1, tile.shape[1], tile.shape[2] // V, V])


@triton.jit
def tile_confidences(
    begins,
    labels,  # the first points to the row's index, or to its first probability
    lane,  # [1, K]
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    V: tl.constexpr,
    SOFT: tl.constexpr,
    MIXED: tl.constexpr,
):
    """First sweep; returns what `swept_confidences` does."""
    target_ptr, label_smoothing, ignore_index = labels
    L: tl.constexpr = BLOCK_C // V
    K: tl.constexpr = lane.shape[1]
    ONE_CLASS: tl.constexpr = (not SOFT) and (label_smoothing is None)
    there = begins[1]
    for i in tl.static_range(3, len(begins), 2):
        there = there | begins[i]
    valid = tl.full([1], True, tl.int1)
    out_of_range = tl.full([1], False, tl.int1)
    target = 0
    if not SOFT:
        index = tl.load(target_ptr).to(tl.int64)
        valid = valid & (index != ignore_index)
        out_of_range = (valid & ((index < 0) | (index >= C))) | out_of_range
        target = tl.where((index < 0) | (index >= C), 0, index).to(tl.int32)
    maxima = tl.full([1, K, L], -float("inf"), tl.float32)
    sums = tl.zeros([1, K, L], tl.float32)
    picks = tl.zeros([1, K, L], tl.float32)  # Σ t (z − max z)
    t_sums = tl.zeros([1, 1, L], tl.float32)
    best = tl.full([1, 1, L], -float("inf"), tl.float32)
    best_at = tl.full([1, 1, L], C - 1, tl.int32)
    for start in tl.range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)[None, None, :]
        z = _of_threads(_logits(begins, there, column, C), V)
        largest = tl.maximum(maxima, tl.max(z, 3))
        # As long as all classes so far are excluded (−inf), 0 is used as their maximum.
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        lower = tl.where(maxima == -float("inf"), 0.0, maxima - shift)
        d = z - shift[:, :, :, None]
        e = tl.where(there[:, :, None, None], tl.exp2(d * LOG2E), 0.0)
        sums = sums * tl.exp2(lower * LOG2E) + tl.sum(e, 3)
        maxima = largest
        if not ONE_CLASS:
            given, t = _targets(labels, target, column, C, SOFT)
            if SOFT:
                given = _of_threads(tl.where(column < C, given, -float("inf")), V)
                most = tl.max(given, 3)
                at = tl.where(given == most[:, :, :, None], _of_threads(column, V), C)
                best_at = tl.where(most > best, tl.min(at, 3), best_at)
                best = tl.maximum(best, most)
            t = _of_threads(t, V)
            picks += tl.where(t_sums > 0.0, t_sums * lower, 0.0)
            picks += tl.sum(tl.where(t > 0.0, t * d, 0.0), 3)
            t_sums += tl.sum(t, 3)
    if SOFT:
        most = tl.max(best, 2)[:, :, None]
        target = tl.min(tl.ravel(tl.where(best == most, best_at, C - 1)), 0)
    z_max = tl.max(maxima, 2)
    place = tl.zeros([1, 1, 1], tl.int32) + target
    d_target = tl.max(_logits(begins, there, place, C), 2) - z_max
    lower = tl.where(maxima == -float("inf"), 0.0, maxima - z_max[:, :, None])
    # The maximum with 0 keeps the product out of the sum, as in `swept_confidences`.
    e_sum = tl.maximum(sums * tl.exp2(lower * LOG2E), 0.0, propagate_nan=tl.PropagateNan.ALL)
    e_sum = tl.sum(e_sum, 2)
    if ONE_CLASS:
        t_sum = tl.full([1, 1], 1.0, tl.float32)
        picked = d_target
    else:
        t_sum = tl.sum(t_sums, 2)
        picked = tl.sum(picks + tl.where(t_sums > 0.0, t_sums * lower, 0.0), 2)
    # A row with all classes excluded has no distribution.
    ell = tl.where(z_max == -float("inf"), float("nan"), log_confidence(picked, t_sum, e_sum))
    return tl.where(there, ell, 0.0), z_max, e_sum, d_target, valid, out_of_range, target, t_sum


@triton.jit
def tile_kd_sums(
    begins,
    kd_inputs,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    V: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Second sweep: the sums of e_m, e_s and the cross terms in each mentor's lane [1, K]."""
    _, _, _, active, lane = kd_inputs
    sum_m = tl.zeros([1, lane.shape[1], BLOCK_C // V], tl.float32)
    sum_s = tl.zeros_like(sum_m)
    cross = tl.zeros_like(sum_m)
    for start in tl.range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)[None, None, :]
        z = _logits(begins, active | (lane == 0), column, C)
        e_m, e_s, crosses = kd_sum_terms(z, kd_inputs, SAME_TAU)
        sum_m += tl.sum(_of_threads(e_m, V), 3)
        sum_s += tl.sum(_of_threads(e_s, V), 3)
        cross += tl.sum(_of_threads(crosses, V), 3)
    return tl.sum(sum_m, 2), tl.sum(sum_s, 2), tl.sum(cross, 2)


@triton.jit
def tile_gradient(
    grad_ptr,
    begins,
    labels,
    of_rows,
    kd_inputs,
    coefficients,  # [1, K] each
    row,  # [1]
    target,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    V: tl.constexpr,
    SOFT: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Third sweep: Σ_k (coef_s · e_s − coef_m · e_m) − a_s · t, the student's term in lane 0."""
    active = kd_inputs[3]
    lane = kd_inputs[4]
    for start in tl.range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)[None, None, :]
        z = _logits(begins, active | (lane == 0), column, C)
        grad = gradient_terms(z, kd_inputs, coefficients, SAME_TAU)
        t = _targets(labels, target, column, C, SOFT)[1]
        grad = finished_gradient(grad, t, of_rows).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + (row * C)[:, None, None] + column, grad, mask=column < C)
