"""Choose how the kernels' work is divided among programs, threads and steps."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from classroomkd.kernels.counters import MAX_GROUPS

# Values of a tile [R, K, L] in pieces that a thread may hold. Two such tiles, of softmax
# numerators, are live at once, besides the compiler's temporaries.
_MAX_VALUES_HELD = 32
_MAX_WARPS_HELD = 4
_MAX_CLASSES_HELD = 128
_MAX_CLASSES_OF_ONE_STEP = 4096
MAX_MENTORS_APART = tl.constexpr(12)
"""Swept rows of more mentors are one tile (``tiles.py``)."""


class Blocks(NamedTuple):
    """A kernel's tiling: ROWS rows per program of num_warps warps, BLOCK_C columns per step.

    A row is held in PIECES pieces; 0 if it is swept. In a step a thread has LOADS loads of V
    columns of each row. In one step the student's logits are kept in registers, or read again
    beside each mentor's. ``max_registers`` is the compiler's limit per thread on NVIDIA GPUs; None
    for no limit.
    """

    BLOCK_C: int
    ROWS: int
    num_warps: int
    PIECES: int = 0
    LOADS: int = 1
    V: int = 1
    KEEP_STUDENT: bool = True
    max_registers: int | None = None

    def compiler_options(self) -> dict[str, int]:
        """What Triton is told besides the kernel's arguments."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps} | limit


def blocks(
    n_classes: int,
    n_mentors: int,
    itemsize: int,
    warp_size: int,
    align: int = 16,
    demand: int = 0,
) -> Blocks:
    """Blocks for rows of ``n_classes``.

    Args:
        itemsize: of the widest dtype, in bytes.
        align: elements, of which all rows begin at a multiple.
        demand: of registers besides the usual: 0 for none, 1 for a report, smoothed labels, logits
            of several dtypes or two temperatures, 2 for class probabilities.

    """
    return held_blocks(n_classes, n_mentors, warp_size, align) or swept_blocks(
        n_classes, n_mentors, itemsize, warp_size, align, demand
    )


def held_blocks(n_classes: int, n_mentors: int, warp_size: int, align: int) -> Blocks | None:
    """Blocks for rows in registers; None if they do not fit, or a sweep is faster.

    A thread has four columns of a piece, the widest float32 load. If a row does not fill a warp, a
    program has several rows. The limits of registers are the lowest that spill none; loads of
    single columns, for many networks, need more.
    """
    n_lanes = triton.next_power_of_2(n_mentors + 1)
    columns = triton.next_power_of_2(n_classes)
    num_warps = 1
    while n_classes <= _MAX_CLASSES_HELD and num_warps <= _MAX_WARPS_HELD:
        piece = min(columns, max(16, 4 * warp_size * num_warps // n_lanes))
        pieces = triton.cdiv(n_classes, piece)
        rows = max(1, 4 * warp_size // (n_lanes * piece))
        values = rows * n_lanes * piece * pieces // (warp_size * num_warps)
        if values <= _MAX_VALUES_HELD:
            limit = None
            if warp_size == 32 and rows == 1 and values <= 16 and (align >= 4 or n_lanes <= 8):
                limit = 80 if values <= 8 else 96
            elif warp_size == 32 and (rows > 1 or align >= 4):
                limit = 128
            return Blocks(piece, rows, num_warps, pieces, max_registers=limit)
        num_warps *= 2
    return None


def swept_blocks(
    n_classes: int, n_mentors: int, itemsize: int, warp_size: int, align: int, demand: int
) -> Blocks:
    """Blocks for rows in sweeps, with loads of up to 16 bytes.

    A row of up to 4096 classes is one step, at most 16 columns a thread, and its gradient stays in
    registers. With more classes a thread has one load of each row per step, or more narrow ones.
    The limits of registers are those that by the model are fastest of those that spill none: 16
    warps a multiprocessor in float32, 20 in bfloat16. Rows of eight warps fit twice on a
    multiprocessor, three times if the student is read again, which pays in bfloat16, whose rows
    stay in L1. With many mentors in float32 fewer rows at a time stay in L2.
    """
    load = 16 // itemsize
    if n_mentors > MAX_MENTORS_APART.value:
        return Blocks(512, 1, 512 // (4 * warp_size), V=4)
    narrow = min(align, n_classes & -n_classes) < load  # loads, of rows that begin anywhere
    plain = demand == 0 and not narrow
    columns, keep = triton.next_power_of_2(n_classes), True
    limit: int | None = 128
    num_warps = max(1, columns // (16 * warp_size))
    if n_classes > _MAX_CLASSES_OF_ONE_STEP:
        columns, num_warps = 1024, 1024 // ((4 if narrow else load) * warp_size)
        if demand == 0 and n_mentors <= 6:
            # In bfloat16 the compiler takes about 80 by itself, a few more on capability 10.0.
            limit = None if itemsize == 2 and n_mentors > 2 and not narrow else 80
        elif demand == 1 and n_mentors <= 6 and narrow:
            columns, num_warps, limit = 512, 512 // (4 * warp_size), 96
    elif num_warps < 8:
        if demand > 1:
            limit = None
        elif itemsize == 4 and n_mentors > 8:
            limit = 168
        elif plain and itemsize == 2:
            limit = 96
    elif plain and itemsize == 2:
        keep = n_mentors == 1 or n_mentors > 6
        limit = 96 if n_mentors > 6 else 80
    tiling = steps(columns, num_warps, load, n_classes, align, warp_size)
    return tiling._replace(KEEP_STUDENT=keep, max_registers=limit if warp_size == 32 else None)


def steps(
    columns: int, num_warps: int, load: int, n_classes: int, align: int, warp_size: int
) -> Blocks:
    """A row in steps of so many columns, in loads of at most ``load`` that are wholly inside."""
    a_thread = max(1, columns // (warp_size * num_warps))
    v = min(load, a_thread, align, n_classes & -n_classes)
    return Blocks(columns, 1, num_warps, LOADS=a_thread // v, V=v)


def position_blocks(n_mentors: int, warp_size: int) -> Blocks:
    """Blocks for dense logits in place: a position per thread, and four classes a step.

    With more mentors two, for more warps and no spill. With few, the compiler would spill for the
    sake of more warps.
    """
    few = n_mentors <= 3
    limit = 128 if few and warp_size == 32 else None
    return Blocks(4 if few else 2, 4 * warp_size, 4, max_registers=limit)


def scaling_blocks(n_classes: int) -> Blocks:
    """Blocks of 1024 elements for the elementwise backward, eight per thread."""
    block_c = min(triton.next_power_of_2(n_classes), 1024)
    return Blocks(block_c, 1024 // block_c, num_warps=4)


class SumBlocks(NamedTuple):
    """The tiling for summing statistics: BLOCK_R rows of BLOCK_STATS numbers at a time."""

    BLOCK_STATS: int
    BLOCK_R: int
    group_shift: int
    """Of 2 ** group_shift programs the last adds up their sums; the last group's those of all."""


def sum_blocks(n_stats: int, n_programs: int, cut: Blocks, warp_size: int) -> SumBlocks:
    """Blocks for sums over programs' statistics, 32 numbers per thread at a time.

    The last of few programs sums those of all: up to four reads take less time than another
    atomic.
    """
    block_stats = triton.next_power_of_2(n_stats)
    block_r = max(1, 32 * warp_size * cut.num_warps // block_stats)
    few = n_programs <= 4 * block_r
    group = n_programs if few else max(block_r, triton.cdiv(n_programs, MAX_GROUPS))
    return SumBlocks(block_stats, block_r, (max(1, group) - 1).bit_length())
