"""Rows in registers: student and mentors are lanes of one tile, [R, K, L], for few classes.

A row is split into pieces of L columns, four per thread (a 16-byte load of float32), and the K
networks are spread over a warp's threads. So a sum over columns is mostly within a thread, and the
work per network is done by one thread instead of all. The student is lane 0: its softmax costs
nothing extra, and the gradient of its cross-entropy is that of one more KD term, at τ = 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    LOG2E,
    cross_terms,
    exponents,
    lane_of,
    log_confidence,
    smoothed,
)


@triton.jit
def held_confidences(
    pieces, ts, target, t_sum, lane, column, M: tl.constexpr, ONE_CLASS: tl.constexpr
):
    """For all lanes [R, K]: ℓ (−inf kept), max z, Σ exp(z − max z), z − max z of the target class;
    and the pieces of z − max z.
    """
    largest = pieces[0]
    for i in tl.static_range(1, len(pieces)):
        largest = tl.maximum(largest, pieces[i])
    maxima = tl.max(largest, 2)
    shift = maxima[:, :, None]
    e_sums = tl.zeros_like(largest)
    picked = tl.zeros_like(largest)
    at_target = tl.zeros_like(largest)
    piece = (target // column.shape[2])[:, None, None]
    ds = ()
    for i in tl.static_range(len(pieces)):
        d = pieces[i] - shift
        e_sums += tl.exp2(d * LOG2E)
        at_target = tl.where(piece == i, d, at_target)
        if not ONE_CLASS:
            picked += tl.where(ts[i] > 0.0, ts[i] * d, 0.0)
        ds = ds + (d,)
    e_sum = tl.sum(e_sums, 2)
    here = target[:, None, None] % column.shape[2] == column
    of_target = tl.sum(tl.where(here, at_target, 0.0), 2)
    if ONE_CLASS:
        ell = log_confidence(of_target, t_sum, e_sum)
    else:
        ell = log_confidence(tl.sum(picked, 2), t_sum, e_sum)
    return tl.where(lane <= M, ell, 0.0), maxima, e_sum, of_target, ds


@triton.jit
def held_kd_sums(ds, students, kd_inputs, SAME_TAU: tl.constexpr):
    """The sums of e_m, of e_s and of the cross terms of each lane [R, K], and the pieces of e_m and
    e_s.
    """
    maxima, tau_m, tau_s, _, lane = kd_inputs
    s_max = lane_of(maxima, lane, 0)
    scale_m = (1.0 / tau_m * LOG2E)[:, :, None]
    scale_s = (1.0 / tau_s * LOG2E)[:, :, None]
    sums_m = tl.zeros_like(ds[0])
    sums_s = tl.zeros_like(ds[0])
    crosses = tl.zeros_like(ds[0])
    es_m = ()
    es_s = ()
    for i in tl.static_range(len(ds)):
        d_s = students[i] - s_max[:, :, None]
        e_m = tl.exp2(exponents(ds[i], scale_m))
        e_s = tl.exp2(exponents(d_s, scale_s))
        sums_m += e_m
        sums_s += e_s
        crosses += cross_terms(e_m, ds[i], d_s, scale_m, scale_s, SAME_TAU)
        es_m = es_m + (e_m,)
        es_s = es_s + (e_s,)
    return tl.sum(sums_m, 2), tl.sum(sums_s, 2), tl.sum(crosses, 2), es_m, es_s


@triton.jit
def store_held_gradient(
    grad_ptr,
    numerators,  # the pieces of e_m, and those of e_s
    coefficients,  # [R, K] each
    labels,
    of_rows,
    where,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Σ_k (coef_s · e_s − coef_m · e_m) − a_s · t, times the factor.

    Each sum over lanes is available in all of them; lane i takes that of piece i, so that the rest
    is done once per column, with one store.
    """
    target_ptr, target_stride, label_smoothing, _ = labels
    task, factor, valid, nonfinite = of_rows
    coef_m, coef_s = coefficients
    es_m, es_s = numerators
    row, target, lane, column, n_rows = where
    K: tl.constexpr = lane.shape[1]
    PIECES: tl.constexpr = len(es_m)
    for first in tl.static_range(0, PIECES, K):
        grad = tl.zeros_like(es_m[0])
        for i in tl.static_range(first, PIECES if first + K > PIECES else first + K):
            terms = es_s[i] * coef_s[:, :, None] - es_m[i] * coef_m[:, :, None]
            here = (lane == i - first)[:, :, None]
            grad = tl.where(here, tl.sum(terms, 1)[:, None, :], grad)
        at = column + (lane + first)[:, :, None] * column.shape[2]
        inside = (row < n_rows)[:, None, None] & (at < C)
        if target_stride is None:
            t = tl.where(at == target[:, None, None], 1.0, 0.0)
        else:
            begin = (row * ALIGN * target_stride)[:, None, None]
            t = tl.load(target_ptr + begin + at, mask=inside, other=0.0).to(tl.float32)
        grad -= smoothed(t, label_smoothing, inside, C) * task[:, :, None]
        grad = tl.where(nonfinite[:, None, None], float("nan"), grad * factor[:, None, None])
        grad = tl.where(valid[:, None, None], grad, 0.0).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + (row * C)[:, None, None] + at, grad, mask=inside)
