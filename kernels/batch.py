"""Operations across the rows of a batch: counting valid rows, and sums in the last program.

Both use ``state``, int64 numbers that are 0 before and after a launch:

    0  slices of the targets taken by programs for counting
    1  the tally: slices counted · 2³² + valid rows in them
    2  groups of programs whose sums are finished
    4… for each group, the number of finished programs

**Counting.** The mean's gradient is divided by the number of valid rows, which must therefore be
known before the first gradient is written. Up to SLICE rows, every program counts them all, with
one load and no waiting. For more rows, the first programs take slices of SLICE targets until none
is left, and add their counts to the tally. Before writing its gradient a program reads the tally,
and unless all slices are counted, takes those that are left and waits for the others. This cannot
deadlock: when a program waits, all slices have been taken, each by a program that is already
running. So each target is read once, and few programs have to take a slice.

**Sums.** Each program stores the sums of its rows' statistics. The last program of a group to
finish sums those of the group and stores the result, and the last program overall sums the groups.
Groups are consecutive programs, so that the order of all additions depends only on the batch size.

**Weights of rows** are summed before the launch instead: a sum of floats that is tallied as the
count is would depend on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.report_layout import BATCH_STATISTICS, MENTOR_STATISTICS

SLICE = tl.constexpr(512)
_TICKETS, _TALLY, _GROUPS, _MEMBERS = (tl.constexpr(i) for i in (0, 1, 2, 4))
# Statistics: loss, valid rows, then the report's numbers in their order.
_FIRST = tl.constexpr(2)
_ACTIVE, _RANK, _TAU, _KL = (
    tl.constexpr(MENTOR_STATISTICS.index(name))
    for name in ("active_share", "rank_weight", "temperature", "kl")
)
_CONFIDENCE, _TASK_LOSS, _MENTOR_LOSS = (
    tl.constexpr(BATCH_STATISTICS.index(name))
    for name in ("student_confidence", "task_loss", "mentor_loss")
)
_PER_MENTOR = tl.constexpr(len(MENTOR_STATISTICS))


@triton.jit
def _count_slice(target_ptr, ignore_index, n_rows, slice, HALVES: tl.constexpr):
    """The number of valid rows in a slice.

    With HALVES the lower halves of int64 indices are compared, for the sake of registers. An index
    that differs from ``ignore_index`` in the upper half alone is taken for it: it is invalid, so
    that the loss is NaN anyway.
    """
    row = slice * SLICE + tl.arange(0, SLICE)
    LONG: tl.constexpr = target_ptr.dtype.element_ty == tl.int64
    if HALVES and (LONG and ignore_index.dtype == tl.int32):
        row_ptr = target_ptr.to(tl.pointer_type(tl.int32)) + 2 * row
    else:
        row_ptr = target_ptr + row
    target = tl.load(row_ptr, mask=row < n_rows, other=0)
    return tl.sum(((row < n_rows) & (target != ignore_index)).to(tl.int32), 0)


@triton.jit
def _take_slices(state_ptr, target_ptr, ignore_index, n_rows, HALVES: tl.constexpr):
    """Count slices as long as there are any that no program has taken."""
    n_slices = tl.cdiv(n_rows, SLICE)
    taken = tl.atomic_add(state_ptr + _TICKETS, 1, sem="relaxed")
    while taken < n_slices:
        mine = _count_slice(target_ptr, ignore_index, n_rows, taken, HALVES)
        tl.atomic_add(state_ptr + _TALLY, mine.to(tl.int64) + 2**32, sem="relaxed")
        taken = tl.atomic_add(state_ptr + _TICKETS, 1, sem="relaxed")


@triton.jit
def count_slices(state_ptr, target_ptr, ignore_index, n_rows, HALVES: tl.constexpr):
    """The number of valid rows if the batch is one slice. Otherwise, starts the tally and returns
    0.
    """
    count = 0
    n_slices = tl.cdiv(n_rows, SLICE)
    if n_slices == 1:
        count = _count_slice(target_ptr, ignore_index, n_rows, 0, HALVES)
    elif tl.program_id(0) < n_slices:
        _take_slices(state_ptr, target_ptr, ignore_index, n_rows, HALVES)
    return count


@triton.jit
def _counted(state_ptr, target_ptr, ignore_index, n_rows, HALVES: tl.constexpr):
    """Complete the tally, or wait for it, and return the number of valid rows."""
    n_slices = tl.cdiv(n_rows, SLICE)
    tally = tl.atomic_add(state_ptr + _TALLY, 0, sem="relaxed")
    if (tally >> 32) < n_slices:
        _take_slices(state_ptr, target_ptr, ignore_index, n_rows, HALVES)
        while (tally >> 32) < n_slices:
            tally = tl.atomic_add(state_ptr + _TALLY, 0, sem="relaxed")
    return (tally & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _weight_total(weight_sum_ptr):
    """What a weighted mean is divided by; rows without weight have a loss of 0."""
    total = tl.load(weight_sum_ptr)
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def gradient_factor(
    scale_ptr, weight_sum_ptr, counting, count, MEAN: tl.constexpr, HALVES: tl.constexpr
):
    """The factor of every row's gradient: the scale, and for the mean 1 / valid rows.

    ``counting`` is what `count_slices` takes, and ``count`` its result, or None if all rows are
    valid. Rows that have weights are divided by the sum of these instead.
    """
    factor = 1.0
    if scale_ptr is not None:
        factor = tl.load(scale_ptr).to(tl.float32)
    if MEAN and weight_sum_ptr is not None:
        factor /= _weight_total(weight_sum_ptr)
    elif MEAN:
        if count is None:
            count = counting[3]
        elif counting[3] > SLICE:
            count = _counted(*counting, HALVES)
        factor /= tl.maximum(count, 1).to(tl.float32)
    return factor


@triton.jit
def store_stat(stats_ptr, number, values, N_STATS: tl.constexpr):
    """Store the sum of one statistic [R] over the program's rows."""
    place = tl.program_id(0).to(tl.int64) * N_STATS + number
    tl.store(stats_ptr + place, tl.sum(values, 0))


@triton.jit
def store_lanes(stats_ptr, number, values, lane, M: tl.constexpr, N_STATS: tl.constexpr):
    """Store the sums of M statistics in lanes [R, K], starting at ``number``."""
    place = tl.program_id(0).to(tl.int64) * N_STATS + number - 1 + lane
    sums = tl.sum(values, 0)[None, :]
    tl.store(stats_ptr + place, sums, mask=(lane > 0) & (lane <= M))


@triton.jit
def report_weights(
    stats_ptr,
    lane,
    valid,  # [R]
    of_mentors,  # [R, K] each: active, share, τ
    of_row,  # [R] each: the student's confidence and cross-entropy
    M: tl.constexpr,
    N_STATS: tl.constexpr,
):
    """The rows' numbers for the report that are known before the KD terms, so that they wait in no
    register; all 0 for invalid rows.
    """
    active, share, tau = of_mentors
    rank = tl.where(valid[:, None], share * M, 0.0)
    tau = tl.where(valid[:, None], tau, 0.0)
    first: tl.constexpr = _FIRST
    store_lanes(stats_ptr, first + _ACTIVE * M, active.to(tl.float32), lane, M, N_STATS)
    store_lanes(stats_ptr, first + _RANK * M, rank, lane, M, N_STATS)
    store_lanes(stats_ptr, first + _TAU * M, tau, lane, M, N_STATS)
    of_batch: tl.constexpr = _FIRST + _PER_MENTOR * M
    store_stat(stats_ptr, of_batch + _CONFIDENCE, tl.where(valid, of_row[0], 0.0), N_STATS)
    store_stat(stats_ptr, of_batch + _TASK_LOSS, tl.where(valid, of_row[1], 0.0), N_STATS)


@triton.jit
def report_kd(stats_ptr, lane, valid, kl, mentor_loss, M: tl.constexpr, N_STATS: tl.constexpr):
    """The rest of the report's numbers: KL_m [R, K] and the mentors' terms [R] of the rows."""
    first: tl.constexpr = _FIRST
    store_lanes(stats_ptr, first + _KL * M, kl, lane, M, N_STATS)
    mentor_loss = tl.where(valid, mentor_loss, 0.0)
    store_stat(stats_ptr, first + _PER_MENTOR * M + _MENTOR_LOSS, mentor_loss, N_STATS)


@triton.jit
def is_last(counter_ptr, n):
    """True in the last of n programs to arrive here, which can then read the others' writes.

    The barrier orders this program's writes before its thread's release, and that thread's acquire
    before everything that follows. The counter is reset to 0 for the next launch.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == n - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _sum_stats(
    stats_ptr, n, N_STATS: tl.constexpr, BLOCK_STATS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Sums [BLOCK_STATS] over statistics [n, N_STATS]."""
    stat = tl.arange(0, BLOCK_STATS)
    sums = tl.zeros([BLOCK_R, BLOCK_STATS], tl.float32)
    for start in range(0, n, BLOCK_R):
        index = start + tl.arange(0, BLOCK_R)
        inside = (index < n)[:, None] & (stat < N_STATS)[None, :]
        offsets = index.to(tl.int64)[:, None] * N_STATS + stat[None, :]
        # Other programs wrote these: read from the shared L2 cache.
        sums += tl.load(stats_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 0)


@triton.jit
def sum_batch(
    stats_ptr,  # [programs + groups, N_STATS]
    state_ptr,
    group_shift,
    N_STATS: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Whether this is the last program overall, and if so the sums [BLOCK_STATS] over all rows."""
    n_programs = tl.num_programs(0)
    group = tl.program_id(0) >> group_shift
    group_programs = 1 << group_shift
    n_groups = (n_programs + group_programs - 1) >> group_shift
    first = group * group_programs
    members = tl.minimum(group_programs, n_programs - first)
    last = is_last(state_ptr + _MEMBERS + group, members)
    sums = tl.zeros([BLOCK_STATS], tl.float32)
    if last:
        start_ptr = stats_ptr + first.to(tl.int64) * N_STATS
        sums = _sum_stats(start_ptr, members, N_STATS, BLOCK_STATS, BLOCK_R)
        if n_groups > 1:
            groups_ptr = stats_ptr + n_programs.to(tl.int64) * N_STATS
            stat = tl.arange(0, BLOCK_STATS)
            tl.store(groups_ptr + group * N_STATS + stat, sums, mask=stat < N_STATS)
            last = is_last(state_ptr + _GROUPS, n_groups)
            if last:
                sums = _sum_stats(groups_ptr, n_groups, N_STATS, BLOCK_STATS, BLOCK_R)
    return last, sums


@triton.jit
def store_batch(
    sums,  # [BLOCK_STATS]
    results,
    weight_sum_ptr,
    state_ptr,
    M: tl.constexpr,
    REDUCTION: tl.constexpr,
    N_STATS: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
):
    """In the last program: loss, what a mean is divided by, report, and reset of the state."""
    loss_ptr, count_ptr, report_ptr = results
    tl.store(state_ptr + _TICKETS, 0)
    tl.store(state_ptr + _TALLY, 0)
    stat = tl.arange(0, BLOCK_STATS)
    n_valid = tl.maximum(tl.sum(tl.where(stat == 1, sums, 0.0), 0), 1.0)
    count = n_valid if weight_sum_ptr is None else _weight_total(weight_sum_ptr)
    if count_ptr is not None:
        tl.store(count_ptr, count)
    if REDUCTION != "none":
        loss = sums / count if REDUCTION == "mean" else sums
        tl.store(loss_ptr + stat, loss, mask=stat == 0)
    if report_ptr is not None:
        # KL is a mean over the rows with the mentor active, counted by its first number.
        is_kl = (stat >= _FIRST + _KL * M) & (stat < _FIRST + (_KL + 1) * M)
        active = tl.gather(sums, tl.where(is_kl, stat - (_KL - _ACTIVE) * M, stat), 0)
        rows = tl.where(is_kl, tl.maximum(active, 1.0), n_valid)
        inside = (stat >= _FIRST) & (stat < N_STATS)
        tl.store(report_ptr + stat - _FIRST, sums / rows, mask=inside)
