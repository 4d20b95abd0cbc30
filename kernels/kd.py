"""The KD terms of swept rows: the second and the third sweep, or both in one.

A row of one tile, whose gradient fits in registers, needs no third sweep: its mentors are read
again one by one, and the numerators of each are still in registers when their sums are known. This
saves 1 + 2M exponentials per class, but needs M sequential reductions instead of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    LOG2E,
    cross_terms,
    divergence,
    exponents,
    reciprocal,
    smoothed,
)
from classroomkd.kernels.ranks import kd_terms
from classroomkd.kernels.swept import GROUP, in_lanes, numbers_of, of_threads, thread_sums


@triton.jit
def _kd_sums(e_m, e_s, cross, LOADS: tl.constexpr, V: tl.constexpr):
    """Σ e_m, Σ e_s and Σ cross of tiles [BLOCK_C], in one reduction across threads."""
    of_m = thread_sums(of_threads(e_m, LOADS, V))
    of_s = thread_sums(of_threads(e_s, LOADS, V))
    of_cross = thread_sums(of_threads(cross, LOADS, V))
    sums = tl.sum(in_lanes((of_m, of_s, of_cross), 4), 1)
    return numbers_of(sums, tl.arange(0, 4)[None, :], 3)


@triton.jit
def _after(begins, m: tl.constexpr, tile, n_classes, column, inside):
    """The next mentor's row, after mentor m's, in the same registers."""
    if m + 1 < len(begins):
        wanted = inside & (n_classes[m + 1] > column * 0)
        # Without a load registers keep what they have, which is −inf beyond the last column: with
        # a constant the compiler would write it to all of them first.
        before = tile.to(begins[m + 1].dtype.element_ty)
        return tl.load(begins[m + 1] + column, mask=wanted, other=before)
    else:
        return tile


@triton.jit
def one_step_kd(
    begins,
    kd_inputs,
    weight,  # [1, K], as is e_sum
    e_sum,
    task,  # [1, 1]
    t_sum,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    V: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Both sweeps in one, for a row of one tile: mentors are read again one by one.

    Returns KL_m in lanes [1, K], the mentors' terms of the loss [1], and the gradient [BLOCK_C]
    without the target's − a_s · t.
    """
    maxima, tau_m, tau_s, active, lane = kd_inputs
    N: tl.constexpr = len(begins)
    z_max = numbers_of(maxima, lane, N)
    taus_m = numbers_of(tau_m, lane, N)
    taus_s = taus_m if SAME_TAU else numbers_of(tau_s, lane, N)
    weights = numbers_of(tl.where(active, weight, 0.0), lane, N)
    n_classes = numbers_of(tl.where(active, C, 0), lane, N)  # that are read
    own = tl.sum(tl.sum(task * t_sum, 1), 0) / numbers_of(e_sum, lane, 1)[0]
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    d_s = tl.load(begins[0] + column, mask=inside, other=-float("inf")).to(tl.float32) - z_max[0]
    grad = tl.zeros_like(d_s)
    kl = tl.zeros_like(maxima)
    loss = tl.zeros([1], tl.float32)
    nothing = tl.full([BLOCK_C], -float("inf"), tl.float32)
    following = _after(begins, 0, nothing, n_classes, column, inside)
    for m in tl.static_range(1, N):
        if n_classes[m] > 0:
            d_m = following.to(tl.float32) - z_max[m]
            following = _after(begins, m, following, n_classes, column, inside)
            of_tau = reciprocal(taus_m[m])
            scale_m = of_tau * LOG2E
            scale_s = scale_m if SAME_TAU else reciprocal(taus_s[m]) * LOG2E
            e_m = tl.exp2(exponents(d_m, scale_m))
            e_s = tl.exp2(exponents(d_s, scale_s))
            cross = cross_terms(e_m, d_m, d_s, scale_m, scale_s, SAME_TAU)
            sums = _kd_sums(e_m, e_s, cross, LOADS, V)
            of_m = reciprocal(sums[0])
            of_s = reciprocal(sums[1])
            grad += e_s * (weights[m] * of_s)
            grad -= e_m * (weights[m] * of_m)
            kl_m = divergence(sums[2], sums[0], sums[1], (of_m, of_s, of_tau))
            kl = tl.where(lane == m, kl_m, kl)
            loss += kd_terms(True, weights[m], taus_s[m], kl_m)
        else:
            following = _after(begins, m, following, n_classes, column, inside)
    # The student's term comes last, so that terms that cancel do not perturb it.
    return kl, loss, grad + tl.exp2(d_s * LOG2E) * own


@triton.jit
def _loads(begins, n_classes, column, inside):
    """Columns of some mentors' rows; −inf of those whose n_classes is 0."""
    tiles = ()
    for m in tl.static_range(len(begins)):
        wanted = inside & (n_classes[m] > column * 0)
        tiles = tiles + (tl.load(begins[m] + column, mask=wanted, other=-float("inf")),)
    return tiles


@triton.jit
def _sums_of_group(
    student,  # where the row begins, and its maximum
    begins,  # of some mentors, as are the next four
    z_max,
    scale_m,
    scale_s,
    n_classes,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    V: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Each thread's Σ e_m, Σ e_s and cross terms, [L] for each of these mentors."""
    student_begin, student_max = student
    L: tl.constexpr = BLOCK_C // V
    sums_m = ()
    sums_s = ()
    crosses = ()
    for _ in tl.static_range(len(begins)):
        sums_m = sums_m + (tl.zeros([L], tl.float32),)
        sums_s = sums_s + (tl.zeros([L], tl.float32),)
        crosses = crosses + (tl.zeros([L], tl.float32),)
    for start in tl.range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < C
        z_s = tl.load(student_begin + column, mask=inside, other=-float("inf"))
        tiles = _loads(begins, n_classes, column, inside)
        d_s = tl.reshape(z_s.to(tl.float32), [L, V]) - student_max
        new_m = ()
        new_s = ()
        new_crosses = ()
        for m in tl.static_range(len(begins)):
            d_m = tl.reshape(tiles[m].to(tl.float32), [L, V]) - z_max[m]
            e_m = tl.exp2(exponents(d_m, scale_m[m]))
            e_s = tl.exp2(exponents(d_s, scale_s[m]))
            cross = cross_terms(e_m, d_m, d_s, scale_m[m], scale_s[m], SAME_TAU)
            new_m = new_m + (sums_m[m] + tl.sum(e_m, 1),)
            new_s = new_s + (sums_s[m] + tl.sum(e_s, 1),)
            new_crosses = new_crosses + (crosses[m] + tl.sum(cross, 1),)
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
    V: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Second sweep: the sums of e_m, e_s and the cross terms in each mentor's lane [1, K]."""
    maxima, tau_m, tau_s, active, lane = kd_inputs
    student = begins[0], numbers_of(maxima, lane, 1)[0]
    sums_m = ()
    sums_s = ()
    crosses = ()
    for first in tl.static_range(1, len(begins), GROUP):
        group = begins[first : first + GROUP]
        z_max = numbers_of(maxima, lane, len(group), first)
        scale_m = numbers_of(1.0 / tau_m * LOG2E, lane, len(group), first)
        scale_s = scale_m
        if not SAME_TAU:
            scale_s = numbers_of(1.0 / tau_s * LOG2E, lane, len(group), first)
        n_classes = numbers_of(tl.where(active, C, 0), lane, len(group), first)  # that are read
        of_group = _sums_of_group(
            student, group, z_max, scale_m, scale_s, n_classes, C, BLOCK_C, V, SAME_TAU
        )
        sums_m = sums_m + of_group[0]
        sums_s = sums_s + of_group[1]
        crosses = crosses + of_group[2]
    K: tl.constexpr = lane.shape[1]
    sum_m = tl.sum(in_lanes((sums_m[0],) + sums_m, K), 1)
    sum_s = tl.sum(in_lanes((sums_s[0],) + sums_s, K), 1)
    return sum_m, sum_s, tl.sum(in_lanes((crosses[0],) + crosses, K), 1)


@triton.jit
def store_tile(grad_ptr, grad, of_rows, row, column, inside, C: tl.constexpr):
    """Store columns of a row's gradient times the factor, in its dtype."""
    _, factor, valid, nonfinite = of_rows
    is_nan = tl.max(nonfinite.to(tl.int32), 0) > 0
    grad = tl.where(is_nan, float("nan"), grad * tl.sum(factor, 0))
    grad = tl.where(tl.max(valid.to(tl.int32), 0) > 0, grad, 0.0)
    tl.store(grad_ptr + tl.sum(row, 0) * C + column, grad.to(grad_ptr.dtype.element_ty), inside)


@triton.jit
def store_row_gradient(
    grad_ptr,
    grad,  # [BLOCK_C], of `one_step_kd`
    labels,
    of_rows,
    row,  # [1]
    target,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Add the gradient's last term and store the gradient."""
    target_ptr, label_smoothing, _ = labels
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    if SOFT:
        t = tl.load(target_ptr + column, mask=inside, other=0.0).to(tl.float32)
    else:
        t = tl.where(column == target, 1.0, 0.0)
    grad -= smoothed(t, label_smoothing, inside, C) * tl.sum(of_rows[0])
    store_tile(grad_ptr, grad, of_rows, row, column, inside, C)


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
    SOFT: tl.constexpr,
    SAME_TAU: tl.constexpr,
):
    """Third sweep: Σ_k (coef_s · e_s − coef_m · e_m) − a_s · t, the student's term in lane 0."""
    target_ptr, label_smoothing, _ = labels
    maxima, tau_m, tau_s, active, lane = kd_inputs
    coef_m, coef_s = coefficients
    N: tl.constexpr = len(begins)
    z_max = numbers_of(maxima, lane, N)
    scale_m = numbers_of(1.0 / tau_m * LOG2E, lane, N)
    if SAME_TAU:
        scale_s = scale_m
    else:
        scale_s = numbers_of(1.0 / tau_s * LOG2E, lane, N)
    of_m = numbers_of(coef_m, lane, N)
    of_s = numbers_of(coef_s, lane, N)
    n_classes = numbers_of(tl.where(active, C, 0), lane, N)  # that are read
    a_s = tl.sum(of_rows[0])
    for start in tl.range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < C
        z_s = tl.load(begins[0] + column, mask=inside, other=-float("inf"))
        tiles = _loads(begins[1 : 1 + GROUP], n_classes[1 : 1 + GROUP], column, inside)
        if SOFT:
            t = tl.load(target_ptr + column, mask=inside, other=0.0).to(tl.float32)
        else:
            t = tl.where(column == target, 1.0, 0.0)
        t = smoothed(t, label_smoothing, inside, C)
        d_s = z_s.to(tl.float32) - z_max[0]
        grad = -tl.exp2(d_s * LOG2E) * of_m[0] - t * a_s
        for g in tl.static_range(1, N, GROUP):
            if g > 1:
                tiles = _loads(begins[g : g + GROUP], n_classes[g : g + GROUP], column, inside)
            for i in tl.static_range(len(tiles)):
                d_m = tiles[i].to(tl.float32) - z_max[g + i]
                grad += tl.exp2(exponents(d_s, scale_s[g + i])) * of_s[g + i]
                grad -= tl.exp2(exponents(d_m, scale_m[g + i])) * of_m[g + i]
        store_tile(grad_ptr, grad, of_rows, row, column, inside, C)
