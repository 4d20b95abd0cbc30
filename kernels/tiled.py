"""Rows too long for registers: the pass of ``classroom.py`` in three sweeps over tiles.

The mathematics is the same. The first sweep (``tiled_scan.py``) takes each row's confidence, the
second the sums of the temperature softmaxes and of the KL, with the maxima known, the third
the gradient. Each sweep reads the M + 1 rows; the last writes one: (3M + 4) · C logits a row. In
the second the running sums of _GROUP mentors share the registers, and for every further _GROUP the
student's row is read once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.device import (
    LOG2E,
    batch_ell,
    cross_terms,
    divergence,
    exponents,
    floored,
    gate_and_temperature,
    kd_term,
    kd_weight,
    load_column,
    load_tile,
    rank_share,
    reduce_batch,
    scale_grad,
    store_batch_stats,
    store_grad,
    store_mentor_stats,
    store_row_loss,
    task_loss,
    task_weights,
    valid_rows,
)
from classroomkd.kernels.tiled_scan import load_targets, row_max, scan_row, scan_targets

_GROUP = tl.constexpr(4)


@triton.jit(do_not_specialize=["ignore_index"])
def tiled_classroom_kernel(
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
    ALIGN: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KNOWLEDGE_FILTER: tl.constexpr,
    MENTORING: tl.constexpr,
    RANK_WEIGHTING: tl.constexpr,
    MEAN: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
):
    """`classroom_kernel` for one row per program, with the same arguments and outputs."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    valid, out_of_range, target, t_sum = scan_targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, C, BLOCK_C, ALIGN
    )
    M: tl.constexpr = len(mentor_ptrs)
    COUNTED: tl.constexpr = SCALE_GRAD and MEAN
    n_valid = 1.0
    if COUNTED:
        n_valid = valid_rows(n_valid_ptr, target_ptr, target_stride, ignore_index, n_rows)

    # First sweep: all log-confidences.
    row_ell, s_max, s_sum, _ = scan_row(
        student_ptr,
        student_stride,
        target_ptr,
        target_stride,
        label_smoothing,
        row,
        target,
        t_sum,
        C,
        BLOCK_C,
        ALIGN,
    )
    nonfinite = out_of_range | (row_ell != row_ell)
    if ell_sums_ptr is None:
        ell_s = floored(row_ell)
    else:
        ell_s = batch_ell(ell_sums_ptr, 0, M, s_max)
        nonfinite = nonfinite | (ell_s != ell_s)
    task = task_weights(ell_s, task_weight)
    loss = task_loss(task, row_ell)

    maxima = ()
    ells = ()
    corrects = ()
    top = ell_s
    for m in tl.static_range(M):
        if ell_sums_ptr is None:
            ell_m, m_max, _, m_target = scan_row(
                mentor_ptrs[m],
                mentor_strides[m],
                target_ptr,
                target_stride,
                label_smoothing,
                row,
                target,
                t_sum,
                C,
                BLOCK_C,
                ALIGN,
            )
            ell_m = floored(ell_m)
        else:
            m_max = row_max(mentor_ptrs[m], mentor_strides[m], row, C, BLOCK_C, ALIGN)
            m_target = load_column(mentor_ptrs[m], mentor_strides[m], row, target, row + 1, ALIGN)
            ell_m = batch_ell(ell_sums_ptr, 1 + m, M, m_max)
        nonfinite = nonfinite | (ell_m != ell_m)
        top = tl.maximum(top, ell_m)
        maxima = maxima + (m_max,)
        ells = ells + (ell_m,)
        corrects = corrects + (m_target == m_max,)

    total = tl.exp2((ell_s - top) * LOG2E)
    for m in tl.static_range(M):
        total += tl.exp2((ells[m] - top) * LOG2E)
    inverse_total = 1.0 / total
    share_s = rank_share(ell_s, top, inverse_total, share_scale)
    shares = ()
    actives = ()
    taus_m = ()
    taus_s = ()
    weights = ()
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
        weight = kd_weight(tau_m, share_m, weight_scale, mentor_weight_ptr, m, M, RANK_WEIGHTING)
        shares = shares + (share_m,)
        actives = actives + (active,)
        taus_m = taus_m + (tau_m,)
        taus_s = taus_s + (tau_s,)
        weights = weights + (weight,)

    # Second sweep: the terms of the active mentors, _GROUP of them at a time.
    mentor_loss = tl.zeros([1], tl.float32)
    kls = ()
    grad_coef_m = ()  # weight / Σ e_m and weight / Σ e_s, which the gradient needs
    grad_coef_s = ()
    for first in tl.static_range(0, M, _GROUP):
        parts_m = ()  # column by column, so that the loop needs no reduction
        parts_s = ()
        parts_cross = ()
        for _ in tl.static_range(first, M if first + _GROUP > M else first + _GROUP):
            parts_m = parts_m + (tl.zeros([1, BLOCK_C], tl.float32),)
            parts_s = parts_s + (tl.zeros([1, BLOCK_C], tl.float32),)
            parts_cross = parts_cross + (tl.zeros([1, BLOCK_C], tl.float32),)
        for start in range(0, C, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = (column < C)[None, :]
            z_s = load_tile(student_ptr, student_stride, row, column, inside, ALIGN)
            d_s = z_s - s_max[:, None]
            next_m = ()
            next_s = ()
            next_cross = ()
            for m in tl.static_range(first, M if first + _GROUP > M else first + _GROUP):
                part_m = parts_m[m - first]
                part_s = parts_s[m - first]
                part_cross = parts_cross[m - first]
                if tl.max(actives[m].to(tl.int32), 0) > 0:
                    z_m = load_tile(mentor_ptrs[m], mentor_strides[m], row, column, inside, ALIGN)
                    v_m = exponents(z_m - maxima[m][:, None], taus_m[m])
                    v_s = exponents(d_s, taus_s[m])
                    e_m = tl.exp2(v_m)
                    part_m += e_m
                    part_s += tl.exp2(v_s)
                    part_cross += cross_terms(e_m, v_m, v_s)
                next_m = next_m + (part_m,)
                next_s = next_s + (part_s,)
                next_cross = next_cross + (part_cross,)
            parts_m = next_m
            parts_s = next_s
            parts_cross = next_cross
        for m in tl.static_range(first, M if first + _GROUP > M else first + _GROUP):
            sum_m = tl.sum(parts_m[m - first], 1)
            cross = tl.sum(parts_cross[m - first], 1)
            sum_s = tl.sum(parts_s[m - first], 1)
            kl = tl.where(actives[m], divergence(cross, sum_m, sum_s), 0.0)
            term = kd_term(actives[m], weights[m], taus_s[m], kl)
            loss += term
            if report_ptr is not None:
                mentor_loss += term
            kls = kls + (kl,)
            grad_coef_m = grad_coef_m + (tl.where(actives[m], weights[m] / sum_m, 0.0),)
            grad_coef_s = grad_coef_s + (tl.where(actives[m], weights[m] / sum_s, 0.0),)

    # Third sweep: the gradient.
    if grad_ptr is not None:
        grad_coef_t = task * t_sum / s_sum
        for start in range(0, C, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = (column < C)[None, :]
            z_s = load_tile(student_ptr, student_stride, row, column, inside, ALIGN)
            d_s = z_s - s_max[:, None]
            e = tl.exp2(d_s * LOG2E)
            t = load_targets(
                target_ptr, target_stride, label_smoothing, row, column, inside, target, C, ALIGN
            )
            grad = e * grad_coef_t[:, None] - t * task[:, None]
            for m in tl.static_range(M):
                if tl.max(actives[m].to(tl.int32), 0) > 0:
                    z_m = load_tile(mentor_ptrs[m], mentor_strides[m], row, column, inside, ALIGN)
                    e_m = tl.exp2(exponents(z_m - maxima[m][:, None], taus_m[m]))
                    e_s = tl.exp2(exponents(d_s, taus_s[m]))
                    grad += e_s * grad_coef_s[m][:, None]
                    grad -= e_m * grad_coef_m[m][:, None]
            if SCALE_GRAD:
                grad = scale_grad(grad, scale_ptr, n_valid, MEAN)
            store_grad(grad_ptr, grad, row, column, inside, valid, nonfinite, C)

    store_row_loss(row_stats_ptr, row, n_rows, valid, nonfinite, loss)
    if report_ptr is not None:
        for m in tl.static_range(M):
            store_mentor_stats(
                row_stats_ptr, m, M, row, n_rows, valid, actives[m], shares[m], taus_m[m], kls[m]
            )
        store_batch_stats(
            row_stats_ptr, M, row, n_rows, valid, nonfinite, ell_s, row_ell, mentor_loss
        )
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
