"""Device functions that the kernels share. Rows are [R], tiles of logits [R, BLOCK_C]."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIN_TAU = tl.constexpr(1e-20)  # nothing is softened any more, and logits over it are finite
FLOOR = tl.constexpr(-3.4028234663852886e38)  # log-confidence of a probability of exactly 0


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
def store_line(ptr, line, row, n_rows, values):
    """Write values [R] into line ``line`` of a [lines, n_rows] array; offsets in 64 bits."""
    tl.store(ptr + (tl.zeros_like(row) + line) * n_rows + row, values, mask=row < n_rows)


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
def task_loss(task, own_ell):
    """a_s · CE [R]. 0 · log 0 is 0: a confidence of 0 takes an infinite cross-entropy with it."""
    return tl.where(task == 0.0, 0.0, task * -own_ell)


@triton.jit
def share_of(ell, top, over_total, share_scale):
    """exp(ℓ) / Σ_j exp(ℓ_j), with 1 / Σ_j exp(ℓ_j − top); rounded on request."""
    share = tl.exp2((ell - top) * LOG2E) * over_total
    if share_scale is not None:
        share = round_half_even(share * share_scale) / share_scale
    return share


@triton.jit
def plan_lesson(
    ell_s,
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
    """Whether the mentor teaches, its temperature and the student's; all [R]."""
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
def weighted_lesson(active, weight, tau_s, kl):
    """A lesson's part of the loss [R]. A weight of 0 takes an infinite divergence with it."""
    weight = weight * tau_s
    return tl.where(active & (weight != 0.0), weight * kl, 0.0)


@triton.jit
def lesson_weight(
    tau_m, share_m, mentors_weight, mentor_weight_ptr, m, M, RANK_WEIGHTING: tl.constexpr
):
    """g_m · r_m · τ_m [R]: times τ_s the weight of KL_m, alone that of its gradient."""
    weight = tau_m * mentors_weight
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
    """e_m · (v_m − v_s), and 0 where e_m is 0, whatever the student says: 0 · log 0 is 0."""
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
def finished(grad, scale_ptr, n_valid, MEAN: tl.constexpr):
    """A gradient times the scale and, for the mean, over the valid rows."""
    factor = 1.0
    if scale_ptr is not None:
        factor = tl.load(scale_ptr).to(tl.float32)
    if MEAN:
        factor /= n_valid
    return grad * factor


@triton.jit
def store_lesson(lines_ptr, m, M, row, n_rows, valid, active, share_m, tau_m, kl):
    """Mentor m's lines for the report."""
    store_line(lines_ptr, 1 + m, row, n_rows, active.to(tl.float32))
    store_line(lines_ptr, 1 + M + m, row, n_rows, tl.where(valid, share_m * M, 0.0))
    store_line(lines_ptr, 1 + 2 * M + m, row, n_rows, tl.where(valid, tau_m, 0.0))
    store_line(lines_ptr, 1 + 3 * M + m, row, n_rows, kl)


@triton.jit
def store_student(lines_ptr, M, row, n_rows, valid, sick, ell_s, own_ell):
    """The student's lines for the report: its confidence and cross-entropy."""
    cross_entropy = tl.where(sick, float("nan"), -own_ell)
    confidence = tl.where(valid, tl.exp2(ell_s * LOG2E), 0.0)
    store_line(lines_ptr, 1 + 4 * M, row, n_rows, confidence)
    store_line(lines_ptr, 2 + 4 * M, row, n_rows, tl.where(valid, cross_entropy, 0.0))


@triton.jit
def store_row_loss(lines_ptr, row, n_rows, valid, sick, loss):
    """A sick mentor must be seen, not filtered; a row that does not count must not be."""
    loss = tl.where(sick, float("nan"), loss)
    store_line(lines_ptr, 0, row, n_rows, tl.where(valid, loss, 0.0))


@triton.jit
def store_grad(grad_ptr, grad, row, column, inside, valid, sick, C: tl.constexpr):
    """A tile of the gradient, in its own dtype."""
    grad = tl.where(sick[:, None], float("nan"), grad)
    grad = tl.where(valid[:, None], grad, 0.0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + row[:, None] * C + column[None, :], grad, mask=inside)


@triton.jit
def is_last_program(counter_ptr):
    """True in the one program that arrives here last; by then all others' lines can be read.

    The barrier puts this program's writes before its thread's release, and that thread's acquire
    before whatever follows. The counter is left at 0 for the next launch.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_lines(
    lines_ptr, n_rows, LINES: tl.constexpr, BLOCK_LINES: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Sums over the rows of lines [LINES, n_rows], in an order fixed by their number alone."""
    line = tl.arange(0, BLOCK_LINES).to(tl.int64)
    sums = tl.zeros([BLOCK_LINES, BLOCK_R], tl.float32)
    for start in range(0, n_rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (line < LINES)[:, None] & (row < n_rows)[None, :]
        offsets = line[:, None] * n_rows + row[None, :]
        # Other programs wrote these: read the cache that all of them share.
        sums += tl.load(lines_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 1)


@triton.jit
def finish(
    lines_ptr,
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
    BLOCK_LINES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Let the last program turn the rows' lines into the batch's loss, count and report."""
    if is_last_program(counter_ptr):
        if not COUNTED:
            n_valid = count_valid(target_ptr, target_stride, ignore_index, n_rows, 256)
        tl.store(count_ptr, n_valid)
        LINES: tl.constexpr = 1 if report_ptr is None else 4 * M + 3
        sums = sum_lines(lines_ptr, n_rows, LINES, BLOCK_LINES, BLOCK_R)
        line = tl.arange(0, BLOCK_LINES)
        if loss_ptr is not None:
            loss = sums / n_valid if MEAN else sums
            tl.store(loss_ptr + line, loss, mask=line == 0)
        if report_ptr is not None:
            # KL is a mean over the rows where the mentor taught; lines 1 … M counted them.
            scratch_ptr = lines_ptr + (tl.zeros_like(line).to(tl.int64) + LINES) * n_rows
            tl.store(scratch_ptr + line, sums, mask=line < LINES)
            tl.debug_barrier()
            is_kl = (line > 3 * M) & (line <= 4 * M)
            n_active = tl.load(scratch_ptr + line - 3 * M, mask=is_kl, other=1.0)
            rows = tl.where(is_kl, tl.maximum(n_active, 1.0), n_valid)
            tl.store(report_ptr + line - 1, sums / rows, mask=(line >= 1) & (line < LINES))
