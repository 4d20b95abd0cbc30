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
_MAX_CLASSES_OF_ONE_STEP = 2048
_MAX_MENTORS_LIMITED = 7
MAX_MENTORS_APART = tl.constexpr(12)
"""Swept rows of more mentors are one tile (``tiles.py``)."""


class Blocks(NamedTuple):
    """A kernel's tiling: ROWS rows per program of num_warps warps, BLOCK_C columns per step.

    A row is held in PIECES pieces; 0 if it is swept. In a step a thread has LOADS loads of V
    columns of each row. ``max_registers`` is the compiler's limit per thread on NVIDIA GPUs; None
    for no limit.
    """

    BLOCK_C: int
    ROWS: int
    num_warps: int
    PIECES: int = 0
    LOADS: int = 1
    V: int = 1
    max_registers: int | None = None

    def compiler_options(self) -> dict[str, int]:
        """What Triton is told besides the kernel's arguments."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps} | limit


def blocks(n_classes: int, n_mentors: int, itemsize: int, warp_size: int) -> Blocks:
    """Blocks for rows of ``n_classes``; ``itemsize`` is that of the widest dtype, in bytes."""
    return held_blocks(n_classes, n_mentors, warp_size) or swept_blocks(
        n_classes, n_mentors, itemsize, warp_size
    )


def held_blocks(n_classes: int, n_mentors: int, warp_size: int) -> Blocks | None:
    """Blocks for rows in registers; None if they do not fit, or a sweep is faster.

    A thread has four columns of a piece, the widest float32 load. If a row does not fill a warp, a
    program has several rows.
    """
    n_lanes = triton.next_power_of_2(n_mentors + 1)
    columns = triton.next_power_of_2(n_classes)
    num_warps = 1
    while n_classes <= _MAX_CLASSES_HELD and num_warps <= _MAX_WARPS_HELD:
        piece = min(columns, max(16, 4 * warp_size * num_warps // n_lanes))
        pieces = triton.cdiv(n_classes, piece)
        rows = max(1, 4 * warp_size // (n_lanes * piece))
        if rows * n_lanes * piece * pieces <= _MAX_VALUES_HELD * warp_size * num_warps:
            # Left to itself the compiler spills a register of several rows on capability 8.0.
            limit = 128 if rows > 1 and warp_size == 32 else None
            return Blocks(piece, rows, num_warps, pieces, max_registers=limit)
        num_warps *= 2
    return None


def swept_blocks(n_classes: int, n_mentors: int, itemsize: int, warp_size: int) -> Blocks:
    """Blocks for rows in sweeps, with a 16-byte load of each row per thread and step.

    A row of up to 2048 classes is one step, 16 columns a thread, and its gradient stays in
    registers. By the model 20 warps a multiprocessor do better there than 16 with more registers
    each, and with many mentors 16 better than 12, even if some are spilled. In the one warp of
    512 classes the compiler would have to spill much; with many mentors such a row takes two warps.
    One or two mentors in float32 gain by one step up to 4096 classes, with as many registers as the
    compiler likes.
    """
    load = 16 // itemsize
    few = n_mentors <= _MAX_MENTORS_LIMITED
    if n_mentors > MAX_MENTORS_APART.value:
        return Blocks(512, 1, 512 // (4 * warp_size), V=4)
    one_step = _MAX_CLASSES_OF_ONE_STEP * (2 if n_mentors <= 2 and itemsize == 4 else 1)
    if n_classes > one_step:
        block_c, num_warps = 1024, 1024 // (load * warp_size)
        limit = None if few else 128
    else:
        block_c = triton.next_power_of_2(n_classes)
        in_a_warp = 16 * warp_size  # columns
        shared = block_c == in_a_warp and not few
        num_warps = 2 if shared else max(1, block_c // in_a_warp)
        if few:
            unlimited = block_c == in_a_warp or block_c > _MAX_CLASSES_OF_ONE_STEP
        else:
            unlimited = block_c < in_a_warp
        limit = None if unlimited else 96 if few and num_warps > 1 else 128
    limit = limit if warp_size == 32 else None
    v = min(load, block_c)
    loads = max(1, block_c // (v * warp_size * num_warps))
    return Blocks(block_c, 1, num_warps, LOADS=loads, V=v, max_registers=limit)


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
    group_programs: int
    """Programs whose sums the last of them adds up; the last group's adds up those of all."""


def sum_blocks(n_stats: int, n_programs: int, cut: Blocks, warp_size: int) -> SumBlocks:
    """Blocks for sums over programs' statistics, 32 numbers per thread at a time."""
    block_stats = triton.next_power_of_2(n_stats)
    block_r = max(1, 32 * warp_size * cut.num_warps // block_stats)
    group = max(block_r, triton.cdiv(n_programs, MAX_GROUPS))
    return SumBlocks(block_stats, block_r, group)
