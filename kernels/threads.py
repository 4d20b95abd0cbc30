"""Sums and maxima of swept rows: within each thread, then across threads.

A thread's share of a tile [N, V] are LOADS loads: reshaped to [LOADS, L, V], those [:, i, :]. Its
values are [L]. Those across threads are in lanes [1, K], which are divided among the threads, so
that work per network is done once and not K times in every thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def of_threads(tile, LOADS: tl.constexpr):
    """A tile [N, V] as [LOADS, L, V]."""
    return tl.reshape(tile, [LOADS, tile.shape[0] // LOADS, tile.shape[1]])


@triton.jit
def thread_sums(tile):
    """Sums [L] of a tile [LOADS, L, V] in each thread."""
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def thread_maxima(tile):
    """Maxima [L] of a tile [LOADS, L, V] in each thread."""
    return tl.max(tl.max(tile, 2), 0)


@triton.jit
def _folded(values, MAX: tl.constexpr):
    """Values [W, 32] of half as many networks: of each pair of threads whose numbers differ in one
    bit, one keeps the first half and the other the second, with the other's share added.
    """
    half: tl.constexpr = len(values) // 2
    W: tl.constexpr = values[0].shape[0]
    thread = tl.arange(0, 32)[None, :] + tl.zeros([W, 1], tl.int32)
    second = (thread & half) != 0
    folded = ()
    for k in tl.static_range(half):
        kept = tl.where(second, values[k + half], values[k])
        given = tl.where(second, values[k], values[k + half])
        taken = tl.gather(given, thread ^ half, 1)
        folded = folded + (tl.maximum(kept, taken) if MAX else kept + taken,)
    return folded


@triton.jit
def _across_threads(values, MAX: tl.constexpr):
    L: tl.constexpr = values[0].shape[0]
    K: tl.constexpr = triton.next_power_of_2(len(values))
    tiles = ()
    for k in tl.static_range(K):
        tiles = tiles + (tl.reshape(values[k if k < len(values) else 0], [L // 32, 32]),)
    for i in tl.static_range(4):
        if (8 >> i) < K:
            tiles = _folded(tiles, MAX)
    # Threads whose numbers agree in the lowest bits now have the same network.
    tile = tl.reshape(tiles[0], [L // K, K])
    return (tl.max(tile, 0) if MAX else tl.sum(tile, 0))[None, :]


@triton.jit
def sums_across(values):
    """Sums in lanes [1, K] of values [L] of 2 to 16 networks; lanes beyond are copies of the first.

    The networks are divided among the threads while they are added up. For eight, a warp executes
    32 instructions and then reduces one value, instead of eight values with 80.
    """
    return _across_threads(values, False)


@triton.jit
def maxima_across(values):
    """Maxima, as `sums_across`."""
    return _across_threads(values, True)


@triton.jit
def number_of(lanes, k: tl.constexpr):
    """Lane k of lanes [1, K], as a scalar."""
    return tl.sum(tl.sum(tl.gather(lanes, tl.full([1, 1], k, tl.int32), 1), 1), 0)


@triton.jit
def numbers_of(lanes, N: tl.constexpr, FIRST: tl.constexpr = 0):
    """N lanes of [1, K] from the first of them on, as scalars."""
    numbers = ()
    for k in tl.static_range(N):
        numbers = numbers + (number_of(lanes, FIRST + k),)
    return numbers


@triton.jit
def _chosen(values, lane):
    """The first or the second half of the values, by a bit of the lane's number."""
    half: tl.constexpr = len(values) // 2
    chosen = ()
    for k in tl.static_range(half):
        chosen = chosen + (tl.where((lane & half) != 0, values[k + half], values[k]),)
    return chosen


@triton.jit
def in_lanes(numbers, lane):
    """2 to 16 scalars in lanes [1, K]; lanes beyond are copies of the first."""
    K: tl.constexpr = lane.shape[1]
    values = numbers
    for _ in tl.static_range(K - len(numbers)):
        values = values + (numbers[0],)
    for i in tl.static_range(4):
        if (8 >> i) < K:
            values = _chosen(values, lane)
    return values[0]
