"""Device functions that the kernels share. Rows are [R], tiles of logits [R, BLOCK_C]."""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.report_layout import BATCH_STATISTICS, MENTOR_STATISTICS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIN_TAU = tl.constexpr(1e-20)  # nothing is softened any more, and logits over it are finite
FLOOR = tl.constexpr(-3.4028234663852886e38)  # log-confidence of a probability of exactly 0
# Statistic 0 of a row is its loss; the report's follow in its order.
_ACTIVE, _RANK, _TAU, _KL = (
    tl.constexpr(MENTOR_STATISTICS.index(name))
    for name in ("active_share", "rank_weight", "temperature", "kl")
)
_CONFIDENCE, _TASK_LOSS, _MENTOR_LOSS = (
    tl.constexpr(BATCH_STATISTICS.index(name))
    for name in ("student_confidence", "task_loss", "mentor_loss")
)
_PER_MENTOR = tl.constexpr(len(MENTOR_STATISTICS))
_PER_BATCH = tl.constexpr(len(BATCH_STATISTICS))


@triton.jit
def load_tile(ptr, stride, row, column, inside, ALIGN: tl.constexpr):
    """Logits [R, BLOCK_C] as float32, −inf outside. ``stride`` counts units of ALIGN elements."""
    offsets = (row * ALIGN)[:, None] * stride + column[None, :]
    return tl.load(ptr + offsets, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def load_column(ptr, stride, row, column, n_rows, ALIGN: tl.constexpr):
    """One logit [R] of each row, as float32; ``column`` [R]."""
    offsets = row * ALIGN * stride + column
    return tl.load(ptr + offsets, mask=row < n_rows, other=0.0).to(tl.float32)


@triton.jit
def store_row_stat(ptr, stat, row, n_rows, values):
    """Write values [R] into row ``stat`` of an array [statistics, n_rows]; offsets in 64 bits."""
    tl.store(ptr + (tl.zeros_like(row) + stat) * n_rows + row, values, mask=row < n_rows)


@triton.jit
def floored(ell):
    """ℓ with −inf made finite, so that two confidences of 0 compare equal. NaN stays NaN."""
    return tl.where(ell < FLOOR, FLOOR, ell)


@triton.jit
def smoothed(t, label_smoothing, inside, C: tl.constexpr):
    """Target probabilities after label smoothing, 0 outside."""
    if label_smoothing is None:
        return t
    else:
        return tl.where(inside, (1.0 - label_smoothing) * t + label_smoothing / C, 0.0)


@triton.jit
def round_half_even(x):
    """Nearest integer to x ≥ 0, halves to the even one, as torch.round does."""
    low = tl.floor(x)
    above = x - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return low + tl.where((above > 0.5) | ((above == 0.5) & (odd == 1.0)), 1.0, 0.0)


@triton.jit
def one_minus_exp(d):
    """1 − exp(−d) for d ≥ 0; by its series where the subtraction would cancel."""
    series = 1.0 - d * (1.0 / 4) * (1.0 - d * (1.0 / 5))
    series = d * (1.0 - d * (1.0 / 2) * (1.0 - d * (1.0 / 3) * series))
    return tl.where(d < 0.125, series, 1.0 - tl.exp2(-d * LOG2E))


@triton.jit
def batch_ell(ell_sums_ptr, k, M, like):
    """Ranking "batch": the mean of ℓ_k over the valid rows, floored, as [R]."""
    mean = tl.load(ell_sums_ptr + k) / tl.maximum(tl.load(ell_sums_ptr + M + 1), 1.0)
    return floored(mean) + tl.zeros_like(like)


@triton.jit
def task_weights(ell_s, task_weight):
    """a_s [R]: the confidence, or the number given."""
    if task_weight is None:
        return tl.exp2(ell_s * LOG2E)
    else:
        return tl.zeros_like(ell_s) + task_weight


@triton.jit
def task_loss(task, row_ell):
    """a_s · CE [R]. 0 · log 0 is 0: a confidence of 0 takes an infinite cross-entropy with it."""
    return tl.where(task == 0.0, 0.0, task * -row_ell)


@triton.jit
def rank_share(ell, top, inverse_total, share_scale):
    """exp(ℓ) / Σ_j exp(ℓ_j), with 1 / Σ_j exp(ℓ_j − top); rounded on request."""
    share = tl.exp2((ell - top) * LOG2E) * inverse_total
    if share_scale is not None:
        share = round_half_even(share * share_scale) / share_scale
    return share


@triton.jit
def gate_and_temperature(
    ell_s,  # [R], as are all down to valid
    ell_m,
    share_s,
    share_m,
    s_max,
    m_max,
    correct,
    valid,
    temperature,
    share_scale,
    KNOWLEDGE_FILTER: tl.constexpr,
    MENTORING: tl.constexpr,
):
    """Whether the mentor is active (bool), its temperature τ_m and the student's τ_s; each [R]."""
    if share_scale is None:
        better = ell_m >= ell_s
        lead = one_minus_exp(tl.abs(ell_m - ell_s))
    else:
        better = share_m >= share_s
        largest = tl.maximum(share_m, share_s)
        lead = tl.where(largest > 0.0, tl.abs(share_m - share_s) / largest, 0.0)

    if KNOWLEDGE_FILTER == "better":
        active = better & valid
    elif KNOWLEDGE_FILTER == "correct":
        active = correct & valid
    elif KNOWLEDGE_FILTER == "correct_and_better":
        active = better & correct & valid
    else:
        active = valid

    if MENTORING == "dtkd":
        both_positive = (s_max > 0.0) & (m_max > 0.0)
        # Of 2 · T · x_m / (x_s + x_m) the sum may be beyond float32, and its half may be 0.
        tau_m = 2.0 * temperature / (1.0 + s_max / m_max)
        tau_s = 2.0 * temperature / (1.0 + m_max / s_max)
        tau_m = tl.where(both_positive, tau_m, temperature)
        tau_s = tl.where(both_positive, tau_s, temperature)
    else:
        if MENTORING == "adaptive":
            tau_m = 1.0 + temperature * lead
        elif MENTORING == "fixed":
            tau_m = tl.zeros_like(lead) + temperature
        else:
            tau_m = tl.zeros_like(lead) + 1.0
        tau_s = tau_m
    return active, tl.maximum(tau_m, MIN_TAU), tl.maximum(tau_s, MIN_TAU)


@triton.jit
def kd_term(active, weight, tau_s, kl):
    """A mentor's term of the loss [R]; 0 where the weight is 0, even if KL is infinite."""
    weight = weight * tau_s
    return tl.where(active & (weight != 0.0), weight * kl, 0.0)


@triton.jit
def kd_weight(tau_m, share_m, weight_scale, mentor_weight_ptr, m, M, RANK_WEIGHTING: tl.constexpr):
    """g_m · r_m · τ_m [R]: times τ_s the weight of KL_m, alone that of its gradient."""
    weight = tau_m * weight_scale
    if RANK_WEIGHTING:
        weight = weight * (share_m * M)
    if mentor_weight_ptr is not None:
        weight = weight * tl.load(mentor_weight_ptr + m).to(tl.float32)
    return weight


@triton.jit
def exponents(d, tau):
    """log2 of the softmax numerators at temperature τ of logits d = z − max z: d · log2(e)/τ.

    The subtraction comes first, so that the largest gives exactly 0: confidences that float32
    cannot tell from 1 are equal, and so are the sums of two distributions that it cannot tell
    from one class.
    """
    return d * (1.0 / tau * LOG2E)[:, None]


@triton.jit
def cross_terms(e_m, v_m, v_s):
    """e_m · (v_m − v_s), and 0 where e_m is 0, whatever the student says: 0 · log 0 is 0.

    A thread that has one term of a row would fuse the product into the sum across threads, which
    would then differ among them; so in short rows the selection comes last. It costs an addition.
    """
    if e_m.shape[1] <= 512:
        return tl.where(e_m == 0.0, 0.0, e_m * (v_m - v_s))
    else:
        return e_m * tl.where(e_m > 0.0, v_m - v_s, 0.0)


@triton.jit
def divergence(cross, sum_m, sum_s):
    """KL_m in nats from Σ e_m (v_m − v_s) in log2 units and the sums Σ e_m and Σ e_s."""
    kl = (cross / sum_m - tl.log2(sum_m / sum_s)) * LN2
    return tl.where(kl < 0.0, 0.0, kl)  # which rounding would make it


@triton.jit
def count_valid(target_ptr, target_stride, ignore_index, n_rows, BLOCK_R: tl.constexpr):
    """How many rows count, at least 1, as a float."""
    if target_stride is None:
        count = tl.zeros([BLOCK_R], tl.int32)
        for start in range(0, n_rows, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            target = tl.load(target_ptr + row, mask=row < n_rows, other=0).to(tl.int64)
            count += ((row < n_rows) & (target != ignore_index)).to(tl.int32)
        return tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    else:
        return tl.maximum(n_rows, 1).to(tl.float32)


@triton.jit
def valid_rows(n_valid_ptr, target_ptr, target_stride, ignore_index, n_rows):
    """The number of valid rows, at least 1: as given, or counted."""
    if n_valid_ptr is None:
        return count_valid(target_ptr, target_stride, ignore_index, n_rows, 256)
    else:
        return tl.maximum(tl.load(n_valid_ptr).to(tl.float32), 1.0)


@triton.jit
def scale_grad(grad, scale_ptr, n_valid, MEAN: tl.constexpr):
    """A gradient times the scale and, for the mean, over the valid rows."""
    factor = 1.0
    if scale_ptr is not None:
        factor = tl.load(scale_ptr).to(tl.float32)
    if MEAN:
        factor /= n_valid
    return grad * factor


@triton.jit
def store_mentor_stats(row_stats_ptr, m, M, row, n_rows, valid, active, share_m, tau_m, kl):
    """Mentor m's statistics of rows, for the report; ``valid`` to ``kl`` are [R]."""
    rank = tl.where(valid, share_m * M, 0.0)
    tau = tl.where(valid, tau_m, 0.0)
    store_row_stat(row_stats_ptr, 1 + _ACTIVE * M + m, row, n_rows, active.to(tl.float32))
    store_row_stat(row_stats_ptr, 1 + _RANK * M + m, row, n_rows, rank)
    store_row_stat(row_stats_ptr, 1 + _TAU * M + m, row, n_rows, tau)
    store_row_stat(row_stats_ptr, 1 + _KL * M + m, row, n_rows, kl)


@triton.jit
def store_batch_stats(row_stats_ptr, M, row, n_rows, valid, nonfinite, ell_s, row_ell, mentor_loss):
    """The other statistics of rows, for the report; ``valid`` to ``mentor_loss`` are [R]."""
    confidence = tl.where(valid, tl.exp2(ell_s * LOG2E), 0.0)
    cross_entropy = tl.where(nonfinite, float("nan"), -row_ell)
    mentor_loss = tl.where(nonfinite, float("nan"), mentor_loss)
    first = 1 + _PER_MENTOR * M
    store_row_stat(row_stats_ptr, first + _CONFIDENCE, row, n_rows, confidence)
    store_row_stat(
        row_stats_ptr, first + _TASK_LOSS, row, n_rows, tl.where(valid, cross_entropy, 0.0)
    )
    store_row_stat(
        row_stats_ptr, first + _MENTOR_LOSS, row, n_rows, tl.where(valid, mentor_loss, 0.0)
    )


@triton.jit
def store_row_loss(row_stats_ptr, row, n_rows, valid, nonfinite, loss):
    """NaN where any network's row is not finite, even if it was filtered out; 0 if not valid."""
    loss = tl.where(nonfinite, float("nan"), loss)
    store_row_stat(row_stats_ptr, 0, row, n_rows, tl.where(valid, loss, 0.0))


@triton.jit
def store_grad(grad_ptr, grad, row, column, inside, valid, nonfinite, C: tl.constexpr):
    """A tile of the gradient, in its own dtype."""
    grad = tl.where(nonfinite[:, None], float("nan"), grad)
    grad = tl.where(valid[:, None], grad, 0.0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + row[:, None] * C + column[None, :], grad, mask=inside)


@triton.jit
def is_last_program(counter_ptr):
    """True in the one program that arrives here last; by then it can read all others' row_stats.

    The barrier puts this program's writes before its thread's release, and that thread's acquire
    before whatever follows. The counter is left at 0 for the next launch.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_row_stats(
    row_stats_ptr, n_rows, N_STATS: tl.constexpr, BLOCK_STATS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Sums over rows of [N_STATS, n_rows], in an order that depends on ``n_rows`` alone."""
    stat = tl.arange(0, BLOCK_STATS).to(tl.int64)
    sums = tl.zeros([BLOCK_STATS, BLOCK_R], tl.float32)
    for start in range(0, n_rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (stat < N_STATS)[:, None] & (row < n_rows)[None, :]
        offsets = stat[:, None] * n_rows + row[None, :]
        # Other programs wrote these: read the cache that all of them share.
        sums += tl.load(row_stats_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 1)


@triton.jit
def reduce_batch(
    row_stats_ptr,
    loss_ptr,
    count_ptr,
    report_ptr,
    counter_ptr,
    target_ptr,
    target_stride,
    ignore_index,
    n_rows,
    n_valid,
    M: tl.constexpr,
    MEAN: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Let the last program reduce the rows' statistics to the batch's loss, count and report."""
    if is_last_program(counter_ptr):
        if not COUNTED:
            n_valid = count_valid(target_ptr, target_stride, ignore_index, n_rows, 256)
        tl.store(count_ptr, n_valid)
        N_REPORT: tl.constexpr = _PER_MENTOR * M + _PER_BATCH
        N_STATS: tl.constexpr = 1 if report_ptr is None else 1 + N_REPORT
        sums = sum_row_stats(row_stats_ptr, n_rows, N_STATS, BLOCK_STATS, BLOCK_R)
        stat = tl.arange(0, BLOCK_STATS)
        if loss_ptr is not None:
            loss = sums / n_valid if MEAN else sums
            tl.store(loss_ptr + stat, loss, mask=stat == 0)
        if report_ptr is not None:
            # KL is a mean over the rows where the mentor is active, which are counted by its first
            # statistic; that sum is another thread's, so all go through memory.
            scratch_ptr = row_stats_ptr + (tl.zeros_like(stat).to(tl.int64) + N_STATS) * n_rows
            tl.store(scratch_ptr + stat, sums, mask=stat < N_STATS)
            tl.debug_barrier()
            is_kl = (stat >= 1 + _KL * M) & (stat < 1 + (_KL + 1) * M)
            n_active = tl.load(scratch_ptr + stat - (_KL - _ACTIVE) * M, mask=is_kl, other=1.0)
            rows = tl.where(is_kl, tl.maximum(n_active, 1.0), n_valid)
            tl.store(report_ptr + stat - 1, sums / rows, mask=(stat >= 1) & (stat < N_STATS))
