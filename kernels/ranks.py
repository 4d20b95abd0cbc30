"""Device functions for the work per network: gate, temperatures and weights.

Networks are lanes [R, K]: the student in lane 0, mentor m (from 1) in lane m.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    FLOOR,
    LOG2E,
    MIN_TAU,
    floored,
    lane_of,
    one_minus_exp,
    round_half_even,
)


@triton.jit
def _network_ells(row_ell, lane, ell_sums_ptr, M: tl.constexpr):
    """ℓ of each network, floored: that of the row, or with ranking "batch" the mean over rows."""
    if ell_sums_ptr is None:
        return floored(row_ell)
    else:
        sums = tl.load(ell_sums_ptr + lane, mask=lane <= M, other=0.0)
        mean = sums / tl.maximum(tl.load(ell_sums_ptr + M + 1), 1.0)
        return floored(mean) + tl.zeros_like(row_ell)


@triton.jit
def _rank_shares(ell, lane, share_scale, M: tl.constexpr):
    """exp(ℓ_k) / Σ_j exp(ℓ_j) [R, K], rounded on request; 0 in lanes without a network."""
    there = lane <= M
    top = tl.max(tl.where(there, ell, FLOOR), 1)[:, None]
    share = tl.where(there, tl.exp2((ell - top) * LOG2E), 0.0)
    share = share * (1.0 / tl.sum(share, 1))[:, None]
    if share_scale is not None:
        share = round_half_even(share * share_scale) / share_scale
    return share


@triton.jit
def _active(
    ell,  # [R, K], as are share and correct
    share,
    correct,
    valid,  # [R]
    lane,  # [1, K]
    share_scale,
    M: tl.constexpr,
    KNOWLEDGE_FILTER: tl.constexpr,
):
    """Which mentors are active, [R, K] bool."""
    if share_scale is None:
        better = ell >= lane_of(ell, lane, 0)
    else:
        better = share >= lane_of(share, lane, 0)
    active = valid[:, None] & (lane > 0) & (lane <= M)
    if KNOWLEDGE_FILTER == "better":
        active = active & better
    elif KNOWLEDGE_FILTER == "correct":
        active = active & correct
    elif KNOWLEDGE_FILTER == "correct_and_better":
        active = active & better & correct
    return active


@triton.jit
def _temperatures(ell, share, maxima, lane, temperature, share_scale, MENTORING: tl.constexpr):
    """The mentors' τ_m and the student's τ_s for each, [R, K]; 1 in the student's lane."""
    if MENTORING == "dtkd":
        s_max = lane_of(maxima, lane, 0)
        both_positive = (s_max > 0.0) & (maxima > 0.0)
        # In 2 · T · x_m / (x_s + x_m) the sum may overflow float32, and its half may be 0.
        tau_m = 2.0 * temperature / (1.0 + s_max / maxima)
        tau_s = 2.0 * temperature / (1.0 + maxima / s_max)
        tau_m = tl.where(both_positive, tau_m, temperature)
        tau_s = tl.where(both_positive, tau_s, temperature)
    else:
        if MENTORING == "adaptive":
            if share_scale is None:
                lead = one_minus_exp(tl.abs(ell - lane_of(ell, lane, 0)))
            else:
                share_s = lane_of(share, lane, 0)
                largest = tl.maximum(share, share_s)
                lead = tl.where(largest > 0.0, tl.abs(share - share_s) / largest, 0.0)
            tau_m = 1.0 + temperature * lead
        elif MENTORING == "fixed":
            tau_m = tl.zeros_like(ell) + temperature
        else:
            tau_m = tl.zeros_like(ell) + 1.0
        tau_s = tau_m
    # On a GPU the maximum of NaN and a number is the number, which would hide a nonfinite row.
    tau_m = tl.maximum(tau_m, MIN_TAU, propagate_nan=tl.PropagateNan.ALL)
    tau_s = tl.maximum(tau_s, MIN_TAU, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(lane == 0, 1.0, tau_m), tau_s


@triton.jit
def _kd_weights(
    tau_m,
    ell,
    share,
    lane,
    weight_scale,
    mentor_weight_ptr,
    M: tl.constexpr,
    WEIGHTING: tl.constexpr,
):
    """g_m · r_m · τ_m [R, K]: the weight of KL_m's gradient, and times τ_s that of KL_m."""
    weight = tau_m * weight_scale
    if WEIGHTING == "rank":
        weight = weight * (share * M)
    elif WEIGHTING == "confidence" and M > 1:
        mentor = (lane > 0) & (lane <= M)
        lowest = tl.min(tl.where(mentor, ell, float("inf")), 1)[:, None]
        doubt = tl.where(mentor, tl.exp2((lowest - ell) * LOG2E), 0.0)
        total = tl.sum(doubt, 1)[:, None]
        weight = weight * ((total - doubt) / (total * (M - 1)))
    if mentor_weight_ptr is not None:
        given = (lane > 0) & (lane <= M)
        weight = weight * tl.load(mentor_weight_ptr + lane - 1, mask=given, other=0.0).to(
            tl.float32
        )
    return weight


@triton.jit
def _task_weights(ell_s, task_weight):
    """a_s, with the shape of ell_s: the confidence, or the given number."""
    if task_weight is None:
        return tl.exp2(ell_s * LOG2E)
    else:
        return tl.zeros_like(ell_s) + task_weight


@triton.jit
def gate_and_temperature(
    first_half,
    given,
    numbers,
    M: tl.constexpr,
    KNOWLEDGE_FILTER: tl.constexpr,
    MENTORING: tl.constexpr,
    WEIGHTING: tl.constexpr,
):
    """Rank all networks. Returns the student's confidence and its weight a_s [R, 1]; the mask of
    nonfinite rows [R]; and [R, K] shares, active, τ_m, τ_s, and the weights g_m · r_m · τ_m.
    """
    row_ell, maxima, d_target, valid, out_of_range, lane = first_half  # [R, K], [R] and [1, K]
    ell_sums_ptr, mentor_weight_ptr = given
    temperature, weight_scale, task_weight, share_scale = numbers
    ell = _network_ells(row_ell, lane, ell_sums_ptr, M)
    is_nan = (lane <= M) & ((ell != ell) | ((lane == 0) & (row_ell != row_ell)))
    nonfinite = out_of_range | (tl.max(is_nan.to(tl.int32), 1) > 0)
    share = _rank_shares(ell, lane, share_scale, M)
    active = _active(ell, share, d_target == 0.0, valid, lane, share_scale, M, KNOWLEDGE_FILTER)
    tau_m, tau_s = _temperatures(ell, share, maxima, lane, temperature, share_scale, MENTORING)
    weight = _kd_weights(tau_m, ell, share, lane, weight_scale, mentor_weight_ptr, M, WEIGHTING)
    ell_s = lane_of(ell, lane, 0)
    task = _task_weights(ell_s, task_weight)
    return tl.exp2(ell_s * LOG2E), task, nonfinite, share, active, tau_m, tau_s, weight


@triton.jit
def task_loss(task, row_ell):
    """a_s · CE. 0 · log 0 is 0: with a confidence of 0 an infinite cross-entropy counts as 0."""
    return tl.where(task == 0.0, 0.0, task * -row_ell)


@triton.jit
def kd_terms(active, weight, tau_s, kl):
    """The mentors' terms of the loss; 0 where the weight is 0, even if KL is infinite."""
    weight = weight * tau_s
    return tl.where(active & (weight != 0.0), weight * kl, 0.0)
