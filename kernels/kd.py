"""The KD terms of swept rows: the second and the third sweep, or both in one.

A row of one step, whose gradient fits in registers, needs no third sweep: its mentors are read
again one by one, and the numerators of each are still in registers when their sums are known. This
saves 2M exponentials per class, but needs a reduction per mentor, one after another, instead of
three for all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.columns import below, class_indicator, columns, loads_of, read_row
from classroomkd.kernels.device import LOG2E, cross_terms, exponents, reciprocal, smoothed
from classroomkd.kernels.swept import GROUP
from classroomkd.kernels.threads import number_of, numbers_of, of_threads, sums_across, thread_sums


@triton.jit
def _scales(tau_m, tau_s, SAME_TAU: tl.constexpr):
    """log2(e) / τ in lanes [1, K], for mentors and student."""
    scale_m = 1.0 / tau_m * LOG2E
    if SAME_TAU:
        return scale_m, scale_m
    else:
        return scale_m, 1.0 / tau_s * LOG2E


@triton.jit
def _bits(active, lane):
    """Lanes [1, K] as the bits of a scalar."""
    return tl.sum(tl.sum(active.to(tl.int32) << lane, 1), 0)


@triton.jit
def _active_maxima(maxima, active, lane):
    """The maxima, +inf of inactive mentors: what stands for their logits has a numerator of 0."""
    return tl.where(active | (lane == 0), maxima, float("inf"))


@triton.jit
def _unknown(first, n_rows, V: tl.constexpr):
    """The same columns, less a 0 which the compiler cannot know: it would keep in registers what it
    has read or computed from them before.
    """
    return tl.multiple_of(first - (n_rows >> 31), V)


@triton.jit
def one_step_kd(
    begins,
    kd_inputs,
    weight,  # [1, K]
    own,
    n_rows,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    V: tl.constexpr,
    KEEP_STUDENT: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Both sweeps in one, for a row of one step: mentors are read again one by one, and so is the
    student's row for each of them unless it is kept in registers.

    Returns the sums of e_m, e_s and the cross terms in each active mentor's lane [1, K], and the
    gradient [N, V] without the target's − a_s · t.
    """
    maxima, tau_m, tau_s, active, lane = kd_inputs
    task, t_sum, e_sum = own  # [1, 1], [1, 1], [1, K]
    own = tl.sum(tl.sum(task * t_sum, 1), 0) / number_of(e_sum, 0)
    inside, first, _ = loads_of(0, C, BLOCK_C, V)
    d_s = below(read_row(begins[0], first, V), number_of(maxima, 0), inside)
    grad = tl.zeros([BLOCK_C // V, V], tl.float32)
    scales_m, scales_s = _scales(tau_m, tau_s, SAME_TAU)
    bits = _bits(active, lane)
    first = _unknown(first, n_rows, V)
    sum_m = tl.full(lane.shape, 1.0, tl.float32)
    sum_s = tl.full(lane.shape, 1.0, tl.float32)
    crosses = tl.zeros(lane.shape, tl.float32)
    for m in tl.static_range(1, len(begins)):
        if (bits & (1 << m)) != 0:
            if not KEEP_STUDENT:
                first = _unknown(first, n_rows, V)
                d_s = below(read_row(begins[0], first, V), number_of(maxima, 0), inside)
            d_m = below(read_row(begins[m], first, V), number_of(maxima, m), inside)
            scale_m = number_of(scales_m, m)
            scale_s = scale_m if SAME_TAU else number_of(scales_s, m)
            e_m = tl.exp2(exponents(d_m, scale_m))
            e_s = tl.exp2(exponents(d_s, scale_s))
            cross = cross_terms(e_m, d_m, d_s, scale_m, scale_s, SAME_TAU)
            sums = sums_across(
                (
                    thread_sums(of_threads(e_m, LOADS)),
                    thread_sums(of_threads(e_s, LOADS)),
                    thread_sums(of_threads(cross, LOADS)),
                )
            )
            of_m, of_s, of_cross = numbers_of(sums, 3)
            weight_m = number_of(weight, m)
            grad += e_s * (weight_m * reciprocal(of_s))
            grad -= e_m * (weight_m * reciprocal(of_m))
            sum_m = tl.where(lane == m, of_m, sum_m)
            sum_s = tl.where(lane == m, of_s, sum_s)
            crosses = tl.where(lane == m, of_cross, crosses)
    if not KEEP_STUDENT:
        d_s = below(
            read_row(begins[0], _unknown(first, n_rows, V), V), number_of(maxima, 0), inside
        )
    # The student's term comes last, so that terms that cancel do not perturb it.
    return sum_m, sum_s, crosses, grad + tl.exp2(d_s * LOG2E) * own


@triton.jit
def _read_group(begins, FIRST: tl.constexpr, bits, read, V: tl.constexpr):
    """Columns of active mentors' rows, the first of which is mentor FIRST."""
    tiles = ()
    for i in tl.static_range(len(begins)):
        tiles = tiles + (read_row(begins[i], read, V, (bits & (1 << (FIRST + i))) != 0),)
    return tiles


@triton.jit
def _sums_of_group(
    begins,
    kd_lanes,
    bits,
    FIRST: tl.constexpr,  # mentor
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    V: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Each thread's Σ e_m, Σ e_s and cross terms, [L] for each of a group's mentors."""
    maxima, scales_m, scales_s = kd_lanes
    group = begins[FIRST : FIRST + GROUP]
    s_max = number_of(maxima, 0)
    z_max = numbers_of(maxima, len(group), FIRST)
    scale_m = numbers_of(scales_m, len(group), FIRST)
    scale_s = scale_m if SAME_TAU else numbers_of(scales_s, len(group), FIRST)
    L: tl.constexpr = BLOCK_C // (LOADS * V)
    sums_m = ()
    sums_s = ()
    crosses = ()
    for _ in tl.static_range(len(group)):
        sums_m = sums_m + (tl.zeros([L], tl.float32),)
        sums_s = sums_s + (tl.zeros([L], tl.float32),)
        crosses = crosses + (tl.zeros([L], tl.float32),)
    for start in tl.range(0, C, BLOCK_C):
        inside, read = loads_of(start, C, BLOCK_C, V)[:2]
        z_s = read_row(begins[0], read, V)
        tiles = _read_group(group, FIRST, bits, read, V)
        d_s = below(z_s, s_max, inside)
        new_m = ()
        new_s = ()
        new_crosses = ()
        for i in tl.static_range(len(group)):
            d_m = below(tiles[i], z_max[i], inside)
            e_m = tl.exp2(exponents(d_m, scale_m[i]))
            e_s = tl.exp2(exponents(d_s, scale_s[i]))
            cross = cross_terms(e_m, d_m, d_s, scale_m[i], scale_s[i], SAME_TAU)
            new_m = new_m + (sums_m[i] + thread_sums(of_threads(e_m, LOADS)),)
            new_s = new_s + (sums_s[i] + thread_sums(of_threads(e_s, LOADS)),)
            new_crosses = new_crosses + (crosses[i] + thread_sums(of_threads(cross, LOADS)),)
        sums_m = new_m
        sums_s = new_s
        crosses = new_crosses
    return sums_m, sums_s, crosses


@triton.jit
def swept_kd_sums(
    begins,
    kd_inputs,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    V: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Second sweep: the sums of e_m, e_s and the cross terms in each mentor's lane [1, K]."""
    maxima, tau_m, tau_s, active, lane = kd_inputs
    maxima = _active_maxima(maxima, active, lane)
    kd_lanes = (maxima,) + _scales(tau_m, tau_s, SAME_TAU)
    bits = _bits(active, lane)
    sums_m = ()
    sums_s = ()
    crosses = ()
    for first in tl.static_range(1, len(begins), GROUP):
        of_group = _sums_of_group(begins, kd_lanes, bits, first, C, BLOCK_C, LOADS, V, SAME_TAU)
        sums_m = sums_m + of_group[0]
        sums_s = sums_s + of_group[1]
        crosses = crosses + of_group[2]
    sum_m = sums_across((sums_m[0],) + sums_m)
    return sum_m, sums_across((sums_s[0],) + sums_s), sums_across((crosses[0],) + crosses)


@triton.jit
def _store_tile(grad_ptr, grad, of_rows, row, loads, C: tl.constexpr, V: tl.constexpr):
    """Store columns of a row's gradient times the factor, in its dtype, V at a time as they were
    loaded.
    """
    _, factor, valid, nonfinite = of_rows
    inside, _, first = loads
    begin = grad_ptr + tl.sum(row, 0) * C
    # Plus 0: Triton would exchange numbers among threads, were the gradient better aligned.
    column = columns(tl.multiple_of(first + (tl.sum(row, 0) >> 62).to(tl.int32), V), V)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    scale = tl.sum(tl.where(nonfinite, float("nan"), factor), 0)
    # Not a select, which would cost four instructions for every value of bfloat16.
    if tl.max(valid.to(tl.int32), 0) > 0:
        tl.store(begin + column, (grad * scale).to(dtype), inside[:, None])
    else:
        tl.store(begin + column, tl.zeros(grad.shape, dtype), inside[:, None])


@triton.jit
def _targets(labels, target, loads, C: tl.constexpr, V: tl.constexpr, SOFT: tl.constexpr):
    """t of the columns [N, V] of a step."""
    target_ptr, label_smoothing, _ = labels
    inside, read, first = loads
    if SOFT:
        t = tl.load(target_ptr + columns(read, V)).to(tl.float32)
    else:
        t = class_indicator(first, target, V)
    return smoothed(t, label_smoothing, inside[:, None], C)


@triton.jit
def store_row_gradient(
    grad_ptr,
    grad,  # [N, V], of `one_step_kd`
    labels,
    of_rows,
    row,  # [1]
    target,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    V: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Add the gradient's last term and store the gradient."""
    loads = loads_of(0, C, BLOCK_C, V)
    grad -= _targets(labels, target, loads, C, V, SOFT) * tl.sum(of_rows[0])
    _store_tile(grad_ptr, grad, of_rows, row, loads, C, V)


@triton.jit
def swept_gradient(
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
    maxima, tau_m, tau_s, active, lane = kd_inputs
    N: tl.constexpr = len(begins)
    maxima = _active_maxima(maxima, active, lane)
    z_max = numbers_of(maxima, N)
    scales_m, scales_s = _scales(tau_m, tau_s, SAME_TAU)
    scale_m = numbers_of(scales_m, N)
    scale_s = scale_m if SAME_TAU else numbers_of(scales_s, N)
    of_m = numbers_of(coefficients[0], N)
    of_s = numbers_of(coefficients[1], N)
    bits = _bits(active, lane)
    a_s = tl.sum(of_rows[0])
    for start in tl.range(0, C, BLOCK_C):
        loads = loads_of(start, C, BLOCK_C, V)
        inside, read, _ = loads
        z_s = read_row(begins[0], read, V)
        tiles = _read_group(begins[1 : 1 + GROUP], 1, bits, read, V)
        t = _targets(labels, target, loads, C, V, SOFT)
        d_s = below(z_s, z_max[0], inside)
        grad = -tl.exp2(d_s * LOG2E) * of_m[0] - t * a_s
        for g in tl.static_range(1, N, GROUP):
            if g > 1:
                tiles = _read_group(begins[g : g + GROUP], g, bits, read, V)
            for i in tl.static_range(len(tiles)):
                d_m = below(tiles[i], z_max[g + i], inside)
                grad += tl.exp2(exponents(d_s, scale_s[g + i])) * of_s[g + i]
                grad -= tl.exp2(exponents(d_m, scale_m[g + i])) * of_m[g + i]
        _store_tile(grad_ptr, grad, of_rows, row, loads, C, V)
