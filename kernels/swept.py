"""Rows in sweeps: one row per program, read three times, for many classes.

Each thread keeps a running maximum and a running sum for every network, over its own columns only:

    S ← S · exp(max_old − max_new) + Σ exp(z − max_new),

which are combined across threads after the loop, for all networks in one reduction. So no loop
contains a barrier or a reduction across threads, and the loads of all rows are in flight together;
an inactive mentor is masked out of them instead of being branched around. More than six mentors are
swept in groups, with the student again beside each, so that their running values leave registers
for more warps. The first sweep computes the confidences, the second the sums of the KD terms, the
third the gradient. In later sweeps, rows that fit are read from a cache.

Tiles are [L, V]: V adjacent columns, the width of a load, for each of L running values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    LOG2E,
    log_confidence,
    smoothed,
)

GROUP = tl.constexpr(6)
"""Mentors whose rows are in registers at once; with more, a sweep reads group after group."""


@triton.jit
def of_threads(tile, LOADS: tl.constexpr, V: tl.constexpr):
    """A tile [BLOCK_C] as [LOADS, L, V], of which a thread has all [:, i, :]."""
    return tl.reshape(tile, [LOADS, tile.shape[0] // (LOADS * V), V])


@triton.jit
def thread_sums(tile):
    """Sums [L] of a tile [LOADS, L, V] in each thread."""
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _pairs(tiles):
    joined = ()
    for i in tl.static_range(len(tiles) // 2):
        joined = joined + (tl.join(tiles[i], tiles[i + len(tiles) // 2]),)
    return joined


@triton.jit
def in_lanes(tiles, K: tl.constexpr):
    """Values [L] of at most K networks as lanes [1, L, K]; those beyond are copies."""
    L: tl.constexpr = tiles[0].shape[0]
    for _ in tl.static_range(K - len(tiles)):
        tiles = tiles + (tiles[0],)
    tiles = _pairs(tiles)
    if K >= 4:
        tiles = _pairs(tiles)
    if K >= 8:
        tiles = _pairs(tiles)
    if K >= 16:
        tiles = _pairs(tiles)
    if K >= 32:
        tiles = _pairs(tiles)
    return tl.reshape(tiles[0], [1, L, K])


@triton.jit
def numbers_of(lanes, lane, N: tl.constexpr, FIRST: tl.constexpr = 0):
    """N of lanes [1, K] from the first of them on, as scalars."""
    bits = lanes.to(tl.int32, bitcast=True)  # of which 0 + x is x to the compiler too
    numbers = ()
    for k in tl.static_range(N):
        number = tl.sum(tl.sum(tl.where(lane == FIRST + k, bits, 0), 1), 0)
        numbers = numbers + (number.to(lanes.dtype, bitcast=True),)
    return numbers


@triton.jit
def row_begins(ptrs, strides, row, ALIGN: tl.constexpr):
    """The pointer to the row of each network; ``row`` is a scalar."""
    begins = ()
    for k in tl.static_range(len(ptrs)):
        begins = begins + (ptrs[k] + row * ALIGN * strides[k],)
    return begins


@triton.jit
def _at(begins, target, lane):
    """Each network's logit of a class, in lanes [1, K]."""
    values = tl.zeros_like(lane).to(tl.float32)
    for k in tl.static_range(len(begins)):
        values = tl.where(lane == k, tl.load(begins[k] + target).to(tl.float32), values)
    return values


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
    best_at = tl.full([L], C, tl.int32)
    for start in tl.range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < C
        if not ONE_CLASS:
            if SOFT:
                t = tl.load(target_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
                tile = of_threads(t, LOADS, V)
                largest = tl.max(tl.max(tile, 2), 0)
                at = tl.where(tile == largest[None, :, None], of_threads(column, LOADS, V), C)
                best_at = tl.where(largest > best, tl.min(tl.min(at, 2), 0), best_at)
                best = tl.maximum(best, largest)
                t = tl.where(inside, t, 0.0)
            else:
                t = tl.where(column == target, 1.0, 0.0)
            t = of_threads(smoothed(t, label_smoothing, inside, C), LOADS, V)
        new_maxima = ()
        new_sums = ()
        new_picks = ()
        for k in tl.static_range(len(begins)):
            z = tl.load(begins[k] + column, mask=inside, other=-float("inf"))
            z = of_threads(z.to(tl.float32), LOADS, V)
            largest = tl.maximum(maxima[k], tl.max(tl.max(z, 2), 0))
            # As long as all classes so far are excluded (−inf), 0 is used as their maximum.
            shift = tl.where(largest == -float("inf"), 0.0, largest)
            lower = tl.where(maxima[k] == -float("inf"), 0.0, maxima[k] - shift)
            d = z - shift[None, :, None]
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
):
    """First sweep. For all lanes [1, K]: ℓ (−inf kept), max z, Σ exp(z − max z), z − max z of the
    target class; for the row: valid and out_of_range [1], the target class, Σ_c t(c) [1, 1].
    """
    target_ptr, label_smoothing, ignore_index = labels
    K: tl.constexpr = lane.shape[1]
    ONE_CLASS: tl.constexpr = (not SOFT) and (label_smoothing is None)
    valid = tl.full([1], True, tl.int1)
    out_of_range = tl.full([1], False, tl.int1)
    target = None
    if not SOFT:
        index = tl.load(target_ptr).to(tl.int64)
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
    of_threads = in_lanes(maxima, K)
    z_max = tl.max(of_threads, 1)  # [1, K]
    at_target = _at(begins, target, lane)  # here, where they fill no registers during the sweep
    lower = tl.where(of_threads == -float("inf"), 0.0, of_threads - z_max[:, None, :])
    e_sum = in_lanes(sums, K) * tl.exp2(lower * LOG2E)
    # Prevents fusing the products into the sum across threads, whose results would then differ
    # between threads. The values do not change otherwise.
    e_sum = tl.maximum(e_sum, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ONE_CLASS:
        t_sum = tl.full([1, 1], 1.0, tl.float32)
        e_sum = tl.sum(e_sum, 1)
        picked = at_target - z_max
    else:
        t_sum = tl.sum(t_sums, 0) + tl.zeros([1, 1], tl.float32)
        t_sums = t_sums[None, :, None]
        picked = in_lanes(picks, K) + tl.where(t_sums > 0.0, t_sums * lower, 0.0)
        e_sum = tl.sum(e_sum, 1)
        picked = tl.sum(picked, 1)
    # A row with all classes excluded has no distribution.
    ell = tl.where(z_max == -float("inf"), float("nan"), log_confidence(picked, t_sum, e_sum))
    return ell, z_max, e_sum, at_target - z_max, valid, out_of_range, target, t_sum
