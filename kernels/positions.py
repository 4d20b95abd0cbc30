"""Rows along positions: dense logits [B, C, P] in memory of that order, read where they lie.

Adjacent positions are adjacent in memory, and the classes of one lie P numbers apart. So a thread
has a position of its own, of which it reads all networks' classes, a few at a time, while its
neighbours read theirs: no reduction crosses threads, and what a warp loads of a class is one piece
of memory. As in ``swept.py`` there are three sweeps, for confidences, KD terms and gradient, with a
running maximum and sum for each network in the first; the later ones find in a cache what fits.

Tiles are [R, K, U]: rows, networks in lanes as in ``held.py``, and U classes. All numbers of a row
are in one thread, to which a lane is a compile-time constant: what is selected by lane costs
nothing, and nothing is computed for lanes without a network.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    LOG2E,
    cross_terms,
    exponents,
    log_confidence,
    smoothed,
)
from classroomkd.kernels.pieces import rows_of_type


@triton.jit
def place_of(row, n_positions, image_factor, image_shift):
    """Row, image and position [R], and the number of positions; a division by multiplication."""
    image = (row * image_factor) >> image_shift
    return row, image, row - image * n_positions, n_positions


@triton.jit
def _addresses(begin, place, column):
    """Of classes [1, 1, U] of each row, given those of their images' first numbers [R, …, 1].

    The hint, that rows are adjacent, makes threads lie along them. Where an image ends it is wrong,
    and does no harm: as no alignment is known, a load is of one number, wherever the next one is.
    """
    _, _, position, n_positions = place
    size = begin.dtype.element_ty.primitive_bitwidth // 8
    offset = position[:, None, None] + column.to(tl.int64) * n_positions
    address = (begin.to(tl.int64) + offset * size).to(begin.dtype)
    return tl.max_contiguous(address, [address.shape[0], 1, 1])


@triton.jit
def _logits_of_type(
    ptrs, strides, place, lane, column, wanted, before, C: tl.constexpr, TYPE: tl.constexpr
):
    """The tile with the lanes of this dtype loaded; others keep their values."""
    begin, mine = rows_of_type(ptrs, strides, place[1], lane, 1, TYPE)
    address = _addresses(begin[:, :, None], place, column)
    mask = (wanted & mine)[:, :, None]
    z = tl.load(address, mask=mask & (column < C), other=-float("inf"))
    return tl.where(mask, z.to(tl.float32), before)


@triton.jit
def _logits(ptrs, strides, place, lane, column, wanted, C: tl.constexpr, MIXED: tl.constexpr):
    """U classes of all networks, [R, K, U]; −inf beyond the last, and where not wanted [R, K]."""
    z = tl.full([wanted.shape[0], wanted.shape[1], column.shape[2]], -float("inf"), tl.float32)
    if MIXED:
        for i in tl.static_range(3):
            z = _logits_of_type(
                ptrs,
                strides,
                place,
                lane,
                column,
                wanted,
                z,
                C,
                (tl.float32, tl.float16, tl.bfloat16)[i],
            )
    else:
        z = _logits_of_type(
            ptrs, strides, place, lane, column, wanted, z, C, ptrs[0].dtype.element_ty
        )
    return z


@triton.jit
def _targets(labels, place, target, column, mask, C: tl.constexpr):
    """t of U classes before and after smoothing, [R, 1, U]; 0 beyond the last."""
    target_ptr, target_stride, label_smoothing, _ = labels
    inside = mask[:, None, None] & (column < C)
    if target_stride is None:
        t = tl.where(inside & (target[:, None, None] == column), 1.0, 0.0)
    else:
        begin = target_ptr + (place[1] * target_stride)[:, None, None]
        address = _addresses(begin, place, column)
        t = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    return t, smoothed(t, label_smoothing, inside, C)


@triton.jit
def position_confidences(
    ptrs,
    strides,
    labels,
    place,
    lane,  # [1, K]
    mask,  # [R]
    C: tl.constexpr,
    U: tl.constexpr,
    MIXED: tl.constexpr,
):
    """First sweep. For all lanes [R, K]: ℓ (−inf kept), max z, Σ exp(z − max z), z − max z of the
    target class; for the rows: valid and out_of_range [R], the target class [R], Σ_c t(c) [R, 1].
    """
    target_ptr, target_stride, label_smoothing, ignore_index = labels
    SOFT: tl.constexpr = target_stride is not None
    ONE_CLASS: tl.constexpr = (not SOFT) and (label_smoothing is None)
    there = lane <= len(ptrs) - 1
    wanted = mask[:, None] & there
    valid = mask
    out_of_range = place[0] < 0
    target = tl.zeros_like(place[0]).to(tl.int32)
    if not SOFT:
        index = tl.load(target_ptr + place[0], mask=mask, other=0).to(tl.int64)
        valid = mask & (index != ignore_index)
        out_of_range = (index < 0) | (index >= C)
        target = tl.where(out_of_range, 0, index).to(tl.int32)
    sums = tl.zeros([mask.shape[0], lane.shape[1]], tl.float32)
    picks = tl.zeros_like(sums)  # Σ t (z − max z)
    maxima = sums - float("inf")
    of_target = maxima
    best = tl.zeros_like(target).to(tl.float32) - float("inf")
    t_sum = tl.zeros_like(best)
    for at in tl.range(0, C, U):
        column = at + tl.arange(0, U)[None, None, :]
        z = _logits(ptrs, strides, place, lane, column, wanted, C, MIXED)
        largest = tl.maximum(maxima, tl.max(z, 2))
        # As long as all classes so far are excluded (−inf), 0 is used as their maximum.
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        lower = tl.where(maxima == -float("inf"), 0.0, maxima - shift)
        d = z - shift[:, :, None]
        e = tl.where(there[:, :, None], tl.exp2(d * LOG2E), 0.0)
        sums = sums * tl.exp2(lower * LOG2E) + tl.sum(e, 2)
        maxima = largest
        if not ONE_CLASS:
            given, t = _targets(labels, place, target, column, mask, C)
            picks += tl.where(t_sum > 0.0, t_sum, 0.0)[:, None] * lower
            picks += tl.sum(tl.where(t > 0.0, t * d, 0.0), 2)
            t_sum += tl.max(tl.sum(t, 2), 1)
        if SOFT:
            most = tl.max(tl.where(column < C, given, -float("inf")), 2)
            first = tl.max(tl.min(tl.where(given == most[:, :, None], column, C - 1), 2), 1)
            most = tl.max(most, 1)
            better = most > best
            best = tl.where(better, most, best)
            target = tl.where(better, first, target)
            of_target = tl.where(better[:, None], -float("inf"), of_target)
        here = target[:, None, None] == column
        of_target = tl.maximum(of_target, tl.max(tl.where(here, z, -float("inf")), 2))
    d_target = of_target - maxima
    if ONE_CLASS:
        t_sum += 1.0
        picks = d_target
    ell = log_confidence(picks, t_sum[:, None], sums)
    # A row with all classes excluded has no distribution.
    ell = tl.where(maxima == -float("inf"), float("nan"), ell)
    ell = tl.where(there, ell, 0.0)
    return ell, maxima, sums, d_target, valid, out_of_range, target, t_sum[:, None]


@triton.jit
def _numerators(z, kd_inputs, SAME_TAU: tl.constexpr):
    """e_m, e_s, z_m − max z_m, z_s − max z_s, and the scales of the latter two, [R, K, U]."""
    maxima, tau_m, tau_s, active, lane = kd_inputs
    scale_m = (1.0 / tau_m * LOG2E)[:, :, None]
    scale_s = scale_m
    if not SAME_TAU:
        scale_s = (1.0 / tau_s * LOG2E)[:, :, None]
    d_m = z - maxima[:, :, None]
    own = tl.where((lane == 0)[:, :, None], d_m, 0.0).to(tl.int32, bitcast=True)
    d_s = tl.sum(own, 1)[:, None, :].to(tl.float32, bitcast=True)
    e_m = tl.where((active | (lane == 0))[:, :, None], tl.exp2(exponents(d_m, scale_m)), 0.0)
    e_s = tl.where(active[:, :, None], tl.exp2(exponents(d_s, scale_s)), 0.0)
    return e_m, e_s, d_m, d_s, scale_m, scale_s


@triton.jit
def kd_sum_terms(z, kd_inputs, SAME_TAU: tl.constexpr):
    """e_m, e_s and the cross terms [R, K, U] of logits."""
    e_m, e_s, d_m, d_s, scale_m, scale_s = _numerators(z, kd_inputs, SAME_TAU)
    return e_m, e_s, cross_terms(e_m, d_m, d_s, scale_m, scale_s, SAME_TAU)


@triton.jit
def gradient_terms(z, kd_inputs, coefficients, SAME_TAU: tl.constexpr):
    """Σ_k (coef_s · e_s − coef_m · e_m) [R, 1, U] of logits [R, K, U]."""
    coef_m, coef_s = coefficients
    e_m, e_s, _, _, _, _ = _numerators(z, kd_inputs, SAME_TAU)
    terms = e_s * coef_s[:, :, None] - e_m * coef_m[:, :, None]
    return tl.sum(terms, 1)[:, None, :]


@triton.jit
def finished_gradient(grad, t, of_rows):
    """`gradient_terms` without a_s · t, times the factor; t after smoothing [R, 1, U]."""
    task, factor, valid, nonfinite = of_rows
    grad -= t * task[:, :, None]
    grad = tl.where(nonfinite[:, None, None], float("nan"), grad * factor[:, None, None])
    return tl.where(valid[:, None, None], grad, 0.0)


@triton.jit
def position_kd_sums(
    ptrs,
    strides,
    place,
    kd_inputs,
    mask,
    C: tl.constexpr,
    U: tl.constexpr,
    SAME_TAU: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Second sweep: the sums of e_m, e_s and the cross terms in each mentor's lane [R, K]."""
    _, tau_m, _, active, lane = kd_inputs
    wanted = mask[:, None] & (active | (lane == 0))
    sum_m = tl.zeros_like(tau_m)
    sum_s = tl.zeros_like(tau_m)
    cross = tl.zeros_like(tau_m)
    for at in tl.range(0, C, U):
        column = at + tl.arange(0, U)[None, None, :]
        z = _logits(ptrs, strides, place, lane, column, wanted, C, MIXED)
        e_m, e_s, crosses = kd_sum_terms(z, kd_inputs, SAME_TAU)
        sum_m += tl.sum(e_m, 2)
        sum_s += tl.sum(e_s, 2)
        cross += tl.sum(crosses, 2)
    return sum_m, sum_s, cross


@triton.jit
def position_gradient(
    grad_ptr,
    ptrs,
    strides,
    labels,
    of_rows,
    place,
    kd_inputs,
    coefficients,  # [R, K] each
    target,
    mask,
    C: tl.constexpr,
    U: tl.constexpr,
    SAME_TAU: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Third sweep: Σ_k (coef_s · e_s − coef_m · e_m) − a_s · t, the student's term in lane 0."""
    active = kd_inputs[3]
    lane = kd_inputs[4]
    wanted = mask[:, None] & (active | (lane == 0))
    begin = grad_ptr + (place[1] * place[3] * C)[:, None, None]
    for at in tl.range(0, C, U):
        column = at + tl.arange(0, U)[None, None, :]
        z = _logits(ptrs, strides, place, lane, column, wanted, C, MIXED)
        grad = gradient_terms(z, kd_inputs, coefficients, SAME_TAU)
        t = _targets(labels, place, target, column, mask, C)[1]
        grad = finished_gradient(grad, t, of_rows).to(grad_ptr.dtype.element_ty)
        address = _addresses(begin, place, column)
        tl.store(address, grad, mask=mask[:, None, None] & (column < C))
