"""Rows in sweeps: one row per program, read more than once, for more classes than are held.

Each thread keeps a running maximum and a running sum for every network, over its own columns only:

    S ← S · exp(max_old − max_new) + Σ exp(z − max_new),

which are combined across threads after the loop, for all networks in one reduction. So no loop
contains a barrier or a reduction across threads, and the loads of all rows are in flight together;
an inactive mentor is masked out of them instead of being branched around. The first sweep computes
the confidences, the second the sums of the KD terms, the third the gradient; a row of one step
needs no third (``kd.py``). Of more than six mentors, the first two sweeps read group after group,
the second with the student again beside each, so that their running values leave registers for
more warps. In later sweeps, rows that fit are read from a cache.

``columns.py`` reads the rows, in tiles [N, V]; ``threads.py`` sums them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.columns import class_indicator, columns, floats, loads_of, read_row
from classroomkd.kernels.device import LOG2E, log_confidence, smoothed
from classroomkd.kernels.threads import (
    in_lanes,
    maxima_across,
    number_of,
    of_threads,
    sums_across,
    thread_maxima,
    thread_sums,
)

GROUP = tl.constexpr(6)
"""Mentors whose rows are in registers at once; in the first sweep beside the student or another."""


@triton.jit
def strides_of(student_stride, mentor_strides, M: tl.constexpr):
    """The row stride of each network, the student's first."""
    strides = (student_stride,)
    for k in tl.static_range(M):
        if mentor_strides is None:
            strides = strides + (student_stride,)
        else:
            strides = strides + (-mentor_strides[k],)
    return strides


@triton.jit
def row_begins(ptrs, strides, row, ALIGN: tl.constexpr):
    """The pointer to the row of each network; ``row`` is a scalar."""
    begins = ()
    for k in tl.static_range(len(ptrs)):
        begins = begins + (ptrs[k] + row * ALIGN * strides[k],)
    return begins


@triton.jit
def _at(begins, target, lane, MIXED: tl.constexpr):
    """Each network's logit of a class, in lanes [1, K]."""
    if MIXED:
        values = tl.zeros_like(lane).to(tl.float32)
        for k in tl.static_range(len(begins)):
            values = tl.where(lane == k, tl.load(begins[k] + target).to(tl.float32), values)
        return values
    else:
        return tl.load(in_lanes(begins, lane) + target).to(tl.float32)


@triton.jit
def _first_sweep(
    begins,  # of some networks
    labels,
    target,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    V: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Each thread's running values [L]: for each of these networks max z, Σ exp(z − max z) and
    Σ t (z − max z); for the row Σ t, the largest probability and its class.
    """
    target_ptr, label_smoothing, _ = labels
    L: tl.constexpr = BLOCK_C // (LOADS * V)
    ONE_CLASS: tl.constexpr = (not SOFT) and (label_smoothing is None)
    maxima = ()
    sums = ()
    picks = ()
    for _ in tl.static_range(len(begins)):
        maxima = maxima + (tl.full([L], -float("inf"), tl.float32),)
        sums = sums + (tl.zeros([L], tl.float32),)
        picks = picks + (tl.zeros([L], tl.float32),)
    t_sums = tl.zeros([L], tl.float32)
    best = tl.full([L], -float("inf"), tl.float32)
    best_at = tl.full([L], C - 1, tl.int32)  # stays if no probability is a number
    for start in tl.range(0, C, BLOCK_C):
        inside, read, first = loads_of(start, C, BLOCK_C, V)
        if not ONE_CLASS:
            if SOFT:
                column = of_threads(columns(read, V), LOADS)
                t = tl.load(target_ptr + columns(read, V)).to(tl.float32)
                largest = thread_maxima(of_threads(t, LOADS))
                is_largest = of_threads(t, LOADS) == largest[None, :, None]
                at = tl.min(tl.min(tl.where(is_largest, column, C), 2), 0)
                best_at = tl.where(largest > best, at, best_at)
                best = tl.maximum(best, largest)
                t = tl.where(inside[:, None], t, 0.0)
            else:
                t = class_indicator(first, target, V)
            t = of_threads(smoothed(t, label_smoothing, inside[:, None], C), LOADS)
        outside = tl.reshape(tl.where(inside, 0.0, float("inf")), [LOADS, L])
        new_maxima = ()
        new_sums = ()
        new_picks = ()
        for k in tl.static_range(len(begins)):
            z = floats(read_row(begins[k], read, V))
            largest = tl.maximum(maxima[k], thread_maxima(of_threads(z, LOADS)))
            # As long as all classes so far are excluded (−inf), 0 is used as their maximum.
            shift = tl.where(largest == -float("inf"), 0.0, largest)
            lower = tl.where(maxima[k] == -float("inf"), 0.0, maxima[k] - shift)
            d = of_threads(z, LOADS) - (shift[None, :] + outside)[:, :, None]
            new_maxima = new_maxima + (largest,)
            new_sums = new_sums + (
                sums[k] * tl.exp2(lower * LOG2E) + thread_sums(tl.exp2(d * LOG2E)),
            )
            if ONE_CLASS:
                new_picks = new_picks + (picks[k],)
            else:
                pick = picks[k] + tl.where(t_sums > 0.0, t_sums * lower, 0.0)
                new_picks = new_picks + (pick + thread_sums(tl.where(t > 0.0, t * d, 0.0)),)
        maxima = new_maxima
        sums = new_sums
        picks = new_picks
        if not ONE_CLASS:
            t_sums += thread_sums(t)
    return maxima, sums, picks, t_sums, best, best_at


@triton.jit
def swept_confidences(
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
    """First sweep. For all lanes [1, K]: ℓ (−inf kept), max z, Σ exp(z − max z), z − max z of the
    target class; for the row: valid and out_of_range [1], the target class, Σ_c t(c) [1, 1].
    """
    target_ptr, label_smoothing, ignore_index = labels
    ONE_CLASS: tl.constexpr = (not SOFT) and (label_smoothing is None)
    valid = tl.full([1], True, tl.int1)
    out_of_range = tl.full([1], False, tl.int1)
    target = None
    if not SOFT:
        index = tl.load(target_ptr)
        # Otherwise the compiler moves the load to where its result is needed, and the row waits
        # for the memory once more.
        tl.debug_barrier()
        index = index.to(tl.int64)
        valid = valid & (index != ignore_index)
        out_of_range = (valid & ((index < 0) | (index >= C))) | out_of_range
        target = tl.where((index < 0) | (index >= C), 0, index).to(tl.int32)
    maxima = ()
    sums = ()
    picks = ()
    for k in tl.static_range(0, len(begins), GROUP + 1):
        of_group = _first_sweep(
            begins[k : k + GROUP + 1], labels, target, C, BLOCK_C, LOADS, V, SOFT
        )
        maxima = maxima + of_group[0]
        sums = sums + of_group[1]
        picks = picks + of_group[2]
        t_sums, best, best_at = of_group[3:]  # the same for every group
    if SOFT:
        largest = tl.max(best, 0)
        target = tl.min(tl.where(best == largest, best_at, C - 1), 0)
    z_max = maxima_across(maxima)
    at_target = _at(begins, target, lane, MIXED)  # here, where it fills no register in the sweep
    e_sums = ()
    from_max = ()
    for k in tl.static_range(len(begins)):
        lower = tl.where(maxima[k] == -float("inf"), 0.0, maxima[k] - number_of(z_max, k))
        # The maximum prevents fusing the product into the sum across threads, whose results would
        # then differ between threads. The value does not change otherwise.
        e_sum = sums[k] * tl.exp2(lower * LOG2E)
        e_sums = e_sums + (tl.maximum(e_sum, 0.0, propagate_nan=tl.PropagateNan.ALL),)
        if not ONE_CLASS:
            from_max = from_max + (picks[k] + tl.where(t_sums > 0.0, t_sums * lower, 0.0),)
    e_sum = sums_across(e_sums)
    if ONE_CLASS:
        t_sum = tl.full([1, 1], 1.0, tl.float32)
        picked = at_target - z_max
    else:
        t_sum = tl.sum(t_sums, 0) + tl.zeros([1, 1], tl.float32)
        picked = sums_across(from_max)
    # A row with all classes excluded has no distribution.
    ell = tl.where(z_max == -float("inf"), float("nan"), log_confidence(picked, t_sum, e_sum))
    return ell, z_max, e_sum, at_target - z_max, valid, out_of_range, target, t_sum
