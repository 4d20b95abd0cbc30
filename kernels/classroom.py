"""One pass over student and mentors: every row's loss and its gradient.

For a row b with student logits z_s, mentor logits z_1 … z_M and target distribution t, k running
over s, 1 … M (the definition in words and symbols: ``classroomkd/loss/definition.py``):

    ℓ_k  = Σ_c t_c (z_k[c] − max z_k) − Σ_c t_c · log Σ_c exp(z_k[c] − max z_k)
    r_m  = M · exp(ℓ_m) / Σ_j exp(ℓ_j)
    Δ_m  = 1 − exp(−|ℓ_m − ℓ_s|)
    loss = a_s · (−ℓ_s) + Σ_m active_m g_m r_m τ_m² KL_m

The temperature softmaxes need no new maxima, since max(z/τ) = max(z)/τ. With
u_k = (z_k − max z_k)/τ, e_k = exp(u_k) and S_k = Σ_c e_k[c]

    KL_m = Σ_c (e_m/S_m) · ((u_m − log S_m) − (u_s − log S_s))
         = (1/S_m) Σ_c e_m · (u_m − u_s) − log(S_m/S_s),

three sums in one sweep; where student and mentor agree the logarithm is of a number near 1, so
nothing cancels. Differentiating, with the weights held constant,

    ∂loss/∂z_s = a_s (softmax(z_s) Σ_c t − t) + Σ_m active_m g_m r_m τ_m (e_s/S_s − e_m/S_m).

So a row costs one read of its M + 1 rows of logits and one write of the gradient, and
1 + M exponentials a class plus 2 for each active mentor. Between the two halves (all ℓ_k must be
known before any r_m) the rows wait in registers.

All exponentials are powers of two of (z − max) · log2(e)/τ: the subtraction comes first, because
z · scale − max · scale would lose the difference of two large logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-3.4028234663852886e38)  # log-confidence of a probability of exactly 0


@triton.jit
def _load_rows(ptr, stride, row, column, mask, ALIGN: tl.constexpr):
    """Rows of logits as float32, −inf outside. ``stride`` counts units of ALIGN elements."""
    offsets = row[:, None] * (stride * ALIGN) + column[None, :]
    return tl.load(ptr + offsets, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _store_line(ptr, line, row, n_rows, values):
    """Write values [R] into line ``line`` of a [lines, n_rows] array; offsets in 64 bits."""
    tl.store(ptr + (tl.zeros_like(row) + line) * n_rows + row, values, mask=row < n_rows)


@triton.jit
def _log_confidence(z, z_max, is_target, t, t_sum, ONE_CLASS: tl.constexpr):
    """ℓ [R] of rows z, −inf kept, and the softmax numerators exp(z − max) with their sum."""
    e = tl.exp2((z - z_max[:, None]) * LOG2E)
    e_sum = tl.sum(e, 1)
    if ONE_CLASS:
        ell = _pick(z, is_target) - z_max - tl.log(e_sum)
    else:
        picked = tl.sum(tl.where(t > 0.0, t * (z - z_max[:, None]), 0.0), 1)
        ell = picked - t_sum * tl.log(e_sum)
    return ell, e, e_sum


@triton.jit
def _pick(z, is_target):
    """The target class's logit, out of registers: exact, as all other summands are 0."""
    return tl.sum(tl.where(is_target, z, 0.0), 1)


@triton.jit
def _floored(ell):
    """ℓ with −inf made finite, so that two confidences of 0 compare equal. NaN stays NaN."""
    return tl.where(ell < FLOOR, FLOOR, ell)


@triton.jit
def _round_half_even(x):
    """Nearest integer to x ≥ 0, halves to the even one, as torch.round does."""
    low = tl.floor(x)
    above = x - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return low + tl.where((above > 0.5) | ((above == 0.5) & (odd == 1.0)), 1.0, 0.0)


@triton.jit
def _one_minus_exp(d):
    """1 − exp(−d) for d ≥ 0; by its series where the subtraction would cancel."""
    series = d * (1.0 - d / 2 * (1.0 - d / 3 * (1.0 - d / 4 * (1.0 - d / 5))))
    return tl.where(d < 0.125, series, 1.0 - tl.exp2(-d * LOG2E))


@triton.jit
def _targets(
    target_ptr,
    target_stride,
    label_smoothing,
    ignore_index,
    row,
    column,
    n_rows,
    C: tl.constexpr,
):
    """Which rows count and which name no class; the target class as a mask; t and its sum.

    Where the target is one class, unsmoothed, nobody uses t, and the compiler drops it.
    """
    in_range = row < n_rows
    inside = in_range[:, None] & (column < C)[None, :]
    if target_stride is None:
        target = tl.load(target_ptr + row, mask=in_range, other=ignore_index).to(tl.int64)
        valid = in_range & (target != ignore_index)
        out_of_range = (target < 0) | (target >= C)
        is_target = column[None, :] == target[:, None]
        t = tl.where(is_target, 1.0, 0.0)
    else:
        valid = in_range
        out_of_range = row < 0
        offsets = row[:, None] * target_stride + column[None, :]
        t = tl.load(target_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        best = tl.max(t, 1)
        first = tl.min(tl.where(inside & (t == best[:, None]), column[None, :], C), 1)
        is_target = column[None, :] == first[:, None]
    if label_smoothing is not None:
        t = tl.where(inside, (1.0 - label_smoothing) * t + label_smoothing / C, 0.0)
    return valid, out_of_range, is_target, t, tl.sum(t, 1)


@triton.jit
def confidence_kernel(
    student_ptr,
    mentor_ptrs,
    target_ptr,
    ell_ptr,
    student_stride,
    mentor_strides,
    target_stride,
    n_rows,
    label_smoothing,
    ignore_index,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """ℓ_k [1 + M, B], the student's first; 0 in rows that do not count. For ranking "batch"."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_C)
    valid, out_of_range, is_target, t, t_sum = _targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, column, n_rows, C
    )
    in_range = row < n_rows
    inside = in_range[:, None] & (column < C)[None, :]
    M: tl.constexpr = len(mentor_ptrs)
    ONE_CLASS: tl.constexpr = (target_stride is None) and (label_smoothing is None)
    for k in tl.static_range(M + 1):
        if k == 0:
            z = _load_rows(student_ptr, student_stride, row, column, inside, ALIGN)
        else:
            z = _load_rows(mentor_ptrs[k - 1], mentor_strides[k - 1], row, column, inside, ALIGN)
        ell, _, _ = _log_confidence(z, tl.max(z, 1), is_target, t, t_sum, ONE_CLASS)
        ell = tl.where(out_of_range, float("nan"), _floored(ell))
        _store_line(ell_ptr, k, row, n_rows, tl.where(valid, ell, 0.0))


@triton.jit
def classroom_kernel(
    student_ptr,
    mentor_ptrs,
    target_ptr,
    mentor_weight_ptr,
    batch_ell_ptr,
    loss_ptr,
    grad_ptr,
    statistics_ptr,
    student_stride,
    mentor_strides,
    target_stride,
    n_rows,
    temperature,
    task_weight,
    label_smoothing,
    share_scale,
    ignore_index,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    KNOWLEDGE_FILTER: tl.constexpr,
    MENTORING: tl.constexpr,
    RANK_WEIGHTING: tl.constexpr,
):
    """Loss [B] and gradient [B, C] of ROWS rows, and on request their statistics.

    What is not wanted is None and costs nothing: ``grad_ptr``, ``statistics_ptr``,
    ``mentor_weight_ptr``; ``batch_ell_ptr`` (ranking "sample"), ``target_stride`` (class indices),
    ``task_weight`` (the confidence), ``label_smoothing`` (none), ``share_scale`` (no rounding,
    else 10 to the number of decimals). Strides count units of ALIGN elements.

    statistics [4M + 2, B] hold, M rows each, active (0 or 1), r_m, τ_m and KL_m (0 if not
    active), then the student's confidence and cross-entropy; 0 in rows that do not count.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_C)
    in_range = row < n_rows
    inside = in_range[:, None] & (column < C)[None, :]
    valid, out_of_range, is_target, t, t_sum = _targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, column, n_rows, C
    )
    M: tl.constexpr = len(mentor_ptrs)
    ONE_CLASS: tl.constexpr = (target_stride is None) and (label_smoothing is None)

    # First half: everyone's confidence. The logits stay in registers.
    z_s = _load_rows(student_ptr, student_stride, row, column, inside, ALIGN)
    s_max = tl.max(z_s, 1)
    own_ell, e, e_sum = _log_confidence(z_s, s_max, is_target, t, t_sum, ONE_CLASS)
    sick = out_of_range | (own_ell != own_ell)
    if batch_ell_ptr is None:
        ell_s = _floored(own_ell)
    else:
        ell_s = tl.load(batch_ell_ptr) + tl.zeros([ROWS], tl.float32)
        sick = sick | (ell_s != ell_s)
    if task_weight is None:
        task = tl.exp2(ell_s * LOG2E)
    else:
        task = tl.zeros([ROWS], tl.float32) + task_weight
    # 0 · log 0 is 0: a confidence of 0 takes an infinite cross-entropy with it.
    loss = tl.where(task == 0.0, 0.0, task * -own_ell)
    if grad_ptr is not None:
        if ONE_CLASS:
            grad = task[:, None] * (e / e_sum[:, None] - tl.where(is_target, 1.0, 0.0))
        else:
            grad = task[:, None] * (e * (t_sum / e_sum)[:, None] - t)

    logits = ()
    maxima = ()
    ells = ()
    corrects = ()
    top = ell_s
    for m in tl.static_range(M):
        z_m = _load_rows(mentor_ptrs[m], mentor_strides[m], row, column, inside, ALIGN)
        m_max = tl.max(z_m, 1)
        if batch_ell_ptr is None:
            ell_m, _, _ = _log_confidence(z_m, m_max, is_target, t, t_sum, ONE_CLASS)
            ell_m = _floored(ell_m)
        else:
            ell_m = tl.load(batch_ell_ptr + 1 + m) + tl.zeros([ROWS], tl.float32)
        sick = sick | (ell_m != ell_m)
        top = tl.maximum(top, ell_m)
        logits = logits + (z_m,)
        maxima = maxima + (m_max,)
        ells = ells + (ell_m,)
        corrects = corrects + (_pick(z_m, is_target) == m_max,)

    total = tl.exp2((ell_s - top) * LOG2E)
    for m in tl.static_range(M):
        total += tl.exp2((ells[m] - top) * LOG2E)
    share_s = tl.exp2((ell_s - top) * LOG2E) / total
    if share_scale is not None:
        share_s = _round_half_even(share_s * share_scale) / share_scale

    # Second half: the lessons of those who teach.
    for m in tl.static_range(M):
        share_m = tl.exp2((ells[m] - top) * LOG2E) / total
        if share_scale is None:
            better = ells[m] >= ell_s
            lead = _one_minus_exp(tl.abs(ells[m] - ell_s))
        else:
            share_m = _round_half_even(share_m * share_scale) / share_scale
            better = share_m >= share_s
            largest = tl.maximum(share_m, share_s)
            lead = tl.where(largest > 0.0, tl.abs(share_m - share_s) / largest, 0.0)

        if KNOWLEDGE_FILTER == "better":
            active = better & valid
        elif KNOWLEDGE_FILTER == "correct":
            active = corrects[m] & valid
        elif KNOWLEDGE_FILTER == "correct_and_better":
            active = better & corrects[m] & valid
        else:
            active = valid

        if MENTORING == "adaptive":
            tau_m = 1.0 + temperature * lead
            tau_s = tau_m
        elif MENTORING == "dtkd":
            both_positive = (s_max > 0.0) & (maxima[m] > 0.0)
            scale = 2.0 * temperature / (s_max + maxima[m])
            tau_m = tl.where(both_positive, scale * maxima[m], temperature)
            tau_s = tl.where(both_positive, scale * s_max, temperature)
        elif MENTORING == "fixed":
            tau_m = tl.zeros([ROWS], tl.float32) + temperature
            tau_s = tau_m
        else:
            tau_m = tl.full([ROWS], 1.0, tl.float32)
            tau_s = tau_m

        kl = tl.zeros([ROWS], tl.float32)
        if tl.max(active.to(tl.int32), 0) > 0:
            u_m = (logits[m] - maxima[m][:, None]) * (1.0 / tau_m * LOG2E)[:, None]
            u_s = (z_s - s_max[:, None]) * (1.0 / tau_s * LOG2E)[:, None]
            e_m = tl.exp2(u_m)
            e_s = tl.exp2(u_s)
            sum_m = tl.sum(e_m, 1)
            sum_s = tl.sum(e_s, 1)
            # 0 · log 0 is 0, also where both classes are ruled out and the difference is NaN.
            cross = tl.sum(tl.where(e_m > 0.0, e_m * (u_m - u_s), 0.0), 1)
            kl = tl.where(active, cross * LN2 / sum_m - tl.log(sum_m / sum_s), 0.0)
            weight = tau_m
            if RANK_WEIGHTING:
                weight = weight * (share_m * M)
            if mentor_weight_ptr is not None:
                weight = weight * tl.load(mentor_weight_ptr + m).to(tl.float32)
            loss += tl.where(active, weight * tau_s * kl, 0.0)
            if grad_ptr is not None:
                pull = e_s * (weight / sum_s)[:, None] - e_m * (weight / sum_m)[:, None]
                grad += tl.where(active[:, None], pull, 0.0)
        if statistics_ptr is not None:
            rank = tl.where(valid, share_m * M, 0.0)
            _store_line(statistics_ptr, m, row, n_rows, active.to(tl.float32))
            _store_line(statistics_ptr, M + m, row, n_rows, rank)
            _store_line(statistics_ptr, 2 * M + m, row, n_rows, tl.where(valid, tau_m, 0.0))
            _store_line(statistics_ptr, 3 * M + m, row, n_rows, kl)

    # A sick mentor must be seen, not filtered; a row that does not count must not be.
    loss = tl.where(sick, float("nan"), loss)
    tl.store(loss_ptr + row, tl.where(valid, loss, 0.0), mask=in_range)
    if grad_ptr is not None:
        grad = tl.where(sick[:, None], float("nan"), grad)
        grad = tl.where(valid[:, None], grad, 0.0).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + row[:, None] * C + column[None, :], grad, mask=inside)
    if statistics_ptr is not None:
        confidence = tl.where(valid, tl.exp2(ell_s * LOG2E), 0.0)
        cross_entropy = tl.where(valid, tl.where(sick, float("nan"), -own_ell), 0.0)
        _store_line(statistics_ptr, 4 * M, row, n_rows, confidence)
        _store_line(statistics_ptr, 4 * M + 1, row, n_rows, cross_entropy)


@triton.jit
def scale_rows_kernel(
    grad_ptr,
    factor_ptr,
    out_ptr,
    factor_stride,
    n_rows,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Autograd's backward: out = grad · factor[row], multiplied in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = row < n_rows
    inside = in_range[:, None] & (column < C)[None, :]
    factor = tl.load(factor_ptr + row * factor_stride, mask=in_range, other=0.0).to(tl.float32)
    offsets = row[:, None] * C + column[None, :]
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + offsets,
        (grad * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=inside,
    )
