"""Reading swept rows: the columns of a step are tiles [N, V], of N loads with V columns each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def loads_of(start, C: tl.constexpr, BLOCK_C: tl.constexpr, V: tl.constexpr):
    """The loads [N] of a step: whether they are in the row, where to read, and their first column.

    V divides C, so that a load is wholly inside the row or outside. Outside it the row's first load
    is repeated: its values are easier to discard, by one maximum per load (`below`), than a masked
    load, which writes a constant to each of its registers first.
    """
    first = start + tl.arange(0, BLOCK_C // V) * V
    inside = first < C
    return inside, tl.multiple_of(tl.where(inside, first, 0), V), first


@triton.jit
def columns(first, V: tl.constexpr):
    """The columns [N, V] of loads [N]."""
    return first[:, None] + tl.arange(0, V)[None, :]


@triton.jit
def read_row(begin, first, V: tl.constexpr, wanted=None):
    """Columns of a row as they are in memory; `floats` makes them numbers. Reads nothing, and
    returns zeros, if the scalar ``wanted`` is false.
    """
    PAIRS: tl.constexpr = begin.dtype.element_ty == tl.bfloat16 and V > 1
    if PAIRS:
        pairs = begin.to(tl.pointer_type(tl.int32), bitcast=True)
        at = pairs + columns(tl.multiple_of(first // 2, V // 2), V // 2)
    else:
        at = begin + columns(first, V)
    if wanted is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=wanted & (first >= 0)[:, None], other=0)


@triton.jit
def floats(tile):
    """What `read_row` read, in float32 [N, V].

    bfloat16 is read in pairs, either of which is a number of float32 after one instruction. For a
    conversion the compiler needs three a pair.
    """
    if tile.dtype == tl.int32:
        low = (tile << 16).to(tl.float32, bitcast=True)
        high = (tile & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), [tile.shape[0], 2 * tile.shape[1]])
    else:
        return tile.to(tl.float32)


@triton.jit
def below(tile, z_max, inside):
    """z − z_max [N, V] of what `read_row` read, and −inf outside the row."""
    return floats(tile) - tl.where(inside, z_max, float("inf"))[:, None]


@triton.jit
def class_indicator(first, target, V: tl.constexpr):
    """t of one class [N, V]."""
    return tl.where(columns(first, V) == target, 1.0, 0.0)
