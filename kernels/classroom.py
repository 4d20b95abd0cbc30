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
known before any r_m) the rows wait in registers. Rows too long for that: ``tiled.py``.

All exponentials are powers of two, of v = u · log2(e); what is summed in log2 units is multiplied
by ln 2 at the end.

Each program writes its rows' losses, and for a report their statistics, to row_stats
[statistics, B]; the last program to arrive sums them. So one launch gives the batch's loss, with
the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    LN2,
    LOG2E,
    batch_ell,
    cross_terms,
    divergence,
    exponents,
    floored,
    gate_and_temperature,
    is_last_program,
    kd_term,
    kd_weight,
    load_column,
    load_tile,
    rank_share,
    reduce_batch,
    scale_grad,
    smoothed,
    store_batch_stats,
    store_grad,
    store_mentor_stats,
    store_row_loss,
    store_row_stat,
    sum_row_stats,
    task_loss,
    task_weights,
    valid_rows,
)


@triton.jit
def _read_targets(
    target_ptr,
    target_stride,
    label_smoothing,
    ignore_index,
    row,  # [R]
    column,  # [BLOCK_C]
    n_rows,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The targets of a block of rows.

    Returns valid [R] and out_of_range [R] (a class index that names no class), the target class [R]
    (0 where there is none), t [R, BLOCK_C] and Σ_c t(c) [R]. Where the target is one class without
    smoothing, only the gradient uses t, as a comparison.
    """
    in_range = row < n_rows
    inside = in_range[:, None] & (column < C)[None, :]
    if target_stride is None:
        index = tl.load(target_ptr + row, mask=in_range, other=0).to(tl.int64)
        valid = in_range & (index != ignore_index)
        out_of_range = (index < 0) | (index >= C)
        target = tl.where(out_of_range, 0, index).to(tl.int32)
        t = tl.where(column[None, :] == target[:, None], 1.0, 0.0)
        t = smoothed(t, label_smoothing, inside, C)
        t_sum = tl.full(target.shape, 1.0, tl.float32)
    else:
        valid = in_range
        out_of_range = row < 0
        offsets = (row * ALIGN)[:, None] * target_stride + column[None, :]
        t = tl.load(target_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        best = tl.max(t, 1)
        target = tl.min(tl.where(inside & (t == best[:, None]), column[None, :], C - 1), 1)
        t = smoothed(t, label_smoothing, inside, C)
        t_sum = tl.sum(t, 1)
    return valid, out_of_range, target, t, t_sum


@triton.jit
def _log_confidence(d, z_max, z_target, t, t_sum, ONE_CLASS: tl.constexpr):
    """ℓ [R] of rows d = z − max z, −inf kept, and the softmax numerators with their sum."""
    e = tl.exp2(d * LOG2E)
    e_sum = tl.sum(e, 1)
    if ONE_CLASS:
        ell = z_target - z_max - tl.log2(e_sum) * LN2
    else:
        ell = tl.sum(tl.where(t > 0.0, t * d, 0.0), 1) - t_sum * tl.log2(e_sum) * LN2
    return ell, e, e_sum


@triton.jit(do_not_specialize=["ignore_index"])
def confidence_kernel(
    student_ptr,  # [B, C] of any row stride
    mentor_ptrs,  # M of [B, C], likewise
    target_ptr,  # class indices [B], or probabilities [B, C]
    ell_ptr,  # float32 [M + 2, B], scratch
    sums_ptr,  # float32 [M + 2]
    counter_ptr,  # int32, 0
    student_stride,  # of rows, in units of ALIGN elements
    mentor_strides,  # M, likewise
    target_stride,  # likewise; None for class indices
    n_rows,  # B
    label_smoothing,  # or None
    ignore_index: tl.int64,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """For ranking "batch": Σ_b ℓ_k, the student's first, and the number of valid rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_C)
    inside = (row < n_rows)[:, None] & (column < C)[None, :]
    valid, out_of_range, target, t, t_sum = _read_targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, column, n_rows, C, ALIGN
    )
    M: tl.constexpr = len(mentor_ptrs)
    ONE_CLASS: tl.constexpr = (target_stride is None) and (label_smoothing is None)
    for k in tl.static_range(M + 1):
        if k == 0:
            ptr, stride = student_ptr, student_stride
        else:
            ptr, stride = mentor_ptrs[k - 1], mentor_strides[k - 1]
        z = load_tile(ptr, stride, row, column, inside, ALIGN)
        z_target = load_column(ptr, stride, row, target, n_rows, ALIGN)
        z_max = tl.max(z, 1)
        d = z - z_max[:, None]
        ell, _, _ = _log_confidence(d, z_max, z_target, t, t_sum, ONE_CLASS)
        ell = tl.where(out_of_range, float("nan"), floored(ell))
        store_row_stat(ell_ptr, k, row, n_rows, tl.where(valid, ell, 0.0))
    store_row_stat(ell_ptr, M + 1, row, n_rows, valid.to(tl.float32))
    if is_last_program(counter_ptr):
        stat = tl.arange(0, BLOCK_STATS)
        sums = sum_row_stats(ell_ptr, n_rows, M + 2, BLOCK_STATS, BLOCK_R)
        tl.store(sums_ptr + stat, sums, mask=stat < M + 2)


@triton.jit(do_not_specialize=["ignore_index"])
def classroom_kernel(
    student_ptr,  # [B, C] of any row stride
    mentor_ptrs,  # M of [B, C], likewise
    target_ptr,  # class indices [B], or probabilities [B, C]
    mentor_weight_ptr,  # [M], or None for 1
    ell_sums_ptr,  # [M + 2] of `confidence_kernel`, or None for ranking "sample"
    row_stats_ptr,  # float32 [1, B], or [4 + 4M, B] and as many numbers of scratch
    grad_ptr,  # [B, C] contiguous, or None
    loss_ptr,  # float32 [], or None where only the rows' losses are wanted
    count_ptr,  # float32 [], the valid rows, at least 1; None for the rows' losses alone
    report_ptr,  # float32 [3 + 4M], or None
    counter_ptr,  # int32, 0; None for the rows' losses alone
    scale_ptr,  # one number, or None for 1
    n_valid_ptr,  # int64 [], the valid rows; None to count them here
    student_stride,  # of rows, in units of ALIGN elements
    mentor_strides,  # M, likewise
    target_stride,  # likewise; None for class indices
    n_rows,  # B
    temperature,
    weight_scale,  # multiplies every mentor's term
    task_weight,  # a_s, or None for the student's confidence
    label_smoothing,  # or None
    share_scale,  # 10 to the power of rank_decimals, or None for no rounding
    ignore_index: tl.int64,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KNOWLEDGE_FILTER: tl.constexpr,
    MENTORING: tl.constexpr,
    RANK_WEIGHTING: tl.constexpr,
    MEAN: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
):
    """Loss, gradient and report of a batch; ROWS rows per program. An argument None costs nothing.

    The first of row_stats is the rows' losses; the others, of which the report is the means, are
    in the order of ``report_layout``. They are 0 in rows that are not valid. The loss is their mean
    (MEAN) or sum. The gradient is each row's own; with SCALE_GRAD it is multiplied by the scale
    and, for the mean, divided by the number of valid rows.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_C)
    in_range = row < n_rows
    inside = in_range[:, None] & (column < C)[None, :]
    valid, out_of_range, target, t, t_sum = _read_targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, column, n_rows, C, ALIGN
    )
    M: tl.constexpr = len(mentor_ptrs)
    ONE_CLASS: tl.constexpr = (target_stride is None) and (label_smoothing is None)

    # All loads first, so that their latencies overlap, also with the count's.
    z_s = load_tile(student_ptr, student_stride, row, column, inside, ALIGN)
    logits = ()
    for m in tl.static_range(M):
        z_m = load_tile(mentor_ptrs[m], mentor_strides[m], row, column, inside, ALIGN)
        logits = logits + (z_m,)
    # The target class's logits again, from the cache: cheaper than selecting them in registers.
    s_target = load_column(student_ptr, student_stride, row, target, n_rows, ALIGN)
    targets = ()
    for m in tl.static_range(M):
        m_target = load_column(mentor_ptrs[m], mentor_strides[m], row, target, n_rows, ALIGN)
        targets = targets + (m_target,)
    COUNTED: tl.constexpr = SCALE_GRAD and MEAN
    n_valid = 1.0
    if COUNTED:
        n_valid = valid_rows(n_valid_ptr, target_ptr, target_stride, ignore_index, n_rows)

    # First half: all log-confidences. The logits minus their maximum stay in registers.
    s_max = tl.max(z_s, 1)
    d_s = z_s - s_max[:, None]
    row_ell, e, e_sum = _log_confidence(d_s, s_max, s_target, t, t_sum, ONE_CLASS)
    nonfinite = out_of_range | (row_ell != row_ell)
    if ell_sums_ptr is None:
        ell_s = floored(row_ell)
    else:
        ell_s = batch_ell(ell_sums_ptr, 0, M, s_max)
        nonfinite = nonfinite | (ell_s != ell_s)
    task = task_weights(ell_s, task_weight)
    loss = task_loss(task, row_ell)
    if grad_ptr is not None:
        grad = e * (task * t_sum / e_sum)[:, None] - t * task[:, None]

    ds = ()
    maxima = ()
    ells = ()
    corrects = ()
    top = ell_s
    for m in tl.static_range(M):
        m_max = tl.max(logits[m], 1)
        d_m = logits[m] - m_max[:, None]
        if ell_sums_ptr is None:
            ell_m, _, _ = _log_confidence(d_m, m_max, targets[m], t, t_sum, ONE_CLASS)
            ell_m = floored(ell_m)
        else:
            ell_m = batch_ell(ell_sums_ptr, 1 + m, M, m_max)
        nonfinite = nonfinite | (ell_m != ell_m)
        top = tl.maximum(top, ell_m)
        ds = ds + (d_m,)
        maxima = maxima + (m_max,)
        ells = ells + (ell_m,)
        corrects = corrects + (targets[m] == m_max,)

    total = tl.exp2((ell_s - top) * LOG2E)
    for m in tl.static_range(M):
        total += tl.exp2((ells[m] - top) * LOG2E)
    inverse_total = 1.0 / total
    share_s = rank_share(ell_s, top, inverse_total, share_scale)

    # Second half: the terms of the active mentors.
    mentor_loss = tl.zeros([ROWS], tl.float32)
    for m in tl.static_range(M):
        share_m = rank_share(ells[m], top, inverse_total, share_scale)
        active, tau_m, tau_s = gate_and_temperature(
            ell_s,
            ells[m],
            share_s,
            share_m,
            s_max,
            maxima[m],
            corrects[m],
            valid,
            temperature,
            share_scale,
            KNOWLEDGE_FILTER,
            MENTORING,
        )
        kl = tl.zeros([ROWS], tl.float32)
        if tl.max(active.to(tl.int32), 0) > 0:
            v_m = exponents(ds[m], tau_m)
            v_s = exponents(d_s, tau_s)
            e_m = tl.exp2(v_m)
            e_s = tl.exp2(v_s)
            sum_m = tl.sum(e_m, 1)
            cross = tl.sum(cross_terms(e_m, v_m, v_s), 1)
            sum_s = tl.sum(e_s, 1)
            kl = tl.where(active, divergence(cross, sum_m, sum_s), 0.0)
            weight = kd_weight(
                tau_m, share_m, weight_scale, mentor_weight_ptr, m, M, RANK_WEIGHTING
            )
            term = kd_term(active, weight, tau_s, kl)
            loss += term
            if report_ptr is not None:
                mentor_loss += term
            if grad_ptr is not None:
                grad += e_s * tl.where(active, weight / sum_s, 0.0)[:, None]
                grad -= e_m * tl.where(active, weight / sum_m, 0.0)[:, None]
        if report_ptr is not None:
            store_mentor_stats(row_stats_ptr, m, M, row, n_rows, valid, active, share_m, tau_m, kl)

    store_row_loss(row_stats_ptr, row, n_rows, valid, nonfinite, loss)
    if report_ptr is not None:
        store_batch_stats(
            row_stats_ptr, M, row, n_rows, valid, nonfinite, ell_s, row_ell, mentor_loss
        )
    if grad_ptr is not None:
        if SCALE_GRAD:
            grad = scale_grad(grad, scale_ptr, n_valid, MEAN)
        store_grad(grad_ptr, grad, row, column, inside, valid, nonfinite, C)
    if count_ptr is not None:
        reduce_batch(
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
            M,
            MEAN,
            COUNTED,
            BLOCK_STATS,
            BLOCK_R,
        )


@triton.jit
def scale_rows_kernel(
    grad_ptr,
    factor_ptr,
    count_ptr,
    out_ptr,
    factor_stride,
    n_rows,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Autograd's backward: out = grad · factor[row] / count, in float32. ``count_ptr`` or None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = row < n_rows
    inside = in_range[:, None] & (column < C)[None, :]
    factor = tl.load(factor_ptr + row * factor_stride, mask=in_range, other=0.0).to(tl.float32)
    if count_ptr is not None:
        factor /= tl.load(count_ptr)
    offsets = row[:, None] * C + column[None, :]
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + offsets,
        (grad * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=inside,
    )
