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
    finish,
    finished,
    floored,
    lesson_weight,
    load_column,
    load_tile,
    plan_lesson,
    share_of,
    store_grad,
    store_lesson,
    store_row_loss,
    store_student,
    task_loss,
    task_weights,
    valid_rows,
    weighted_lesson,
)
from classroomkd.kernels.tiled_scan import load_targets, row_max, scan_row, scan_targets

_GROUP = tl.constexpr(4)


@triton.jit
def tiled_classroom_kernel(
    student_ptr,
    mentor_ptrs,
    target_ptr,
    mentor_weight_ptr,
    ell_sums_ptr,
    lines_ptr,
    grad_ptr,
    loss_ptr,
    count_ptr,
    report_ptr,
    counter_ptr,
    scale_ptr,
    n_valid_ptr,
    student_stride,
    mentor_strides,
    target_stride,
    n_rows,
    temperature,
    mentors_weight,
    task_weight,
    label_smoothing,
    share_scale,
    ignore_index,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KNOWLEDGE_FILTER: tl.constexpr,
    MENTORING: tl.constexpr,
    RANK_WEIGHTING: tl.constexpr,
    MEAN: tl.constexpr,
    FINISHED_GRAD: tl.constexpr,
):
    """`classroom_kernel`, one row a program, whose arguments and outputs it shares."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    valid, out_of_range, target, t_sum = scan_targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, C, BLOCK_C, ALIGN
    )
    M: tl.constexpr = len(mentor_ptrs)
    COUNTED: tl.constexpr = FINISHED_GRAD and MEAN
    n_valid = 1.0
    if COUNTED:
        n_valid = valid_rows(n_valid_ptr, target_ptr, target_stride, ignore_index, n_rows)

    # First sweep: everyone's confidence.
    own_ell, s_max, s_sum, _ = scan_row(
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
    sick = out_of_range | (own_ell != own_ell)
    if ell_sums_ptr is None:
        ell_s = floored(own_ell)
    else:
        ell_s = batch_ell(ell_sums_ptr, 0, M, s_max)
        sick = sick | (ell_s != ell_s)
    task = task_weights(ell_s, task_weight)
    loss = task_loss(task, own_ell)

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
        sick = sick | (ell_m != ell_m)
        top = tl.maximum(top, ell_m)
        maxima = maxima + (m_max,)
        ells = ells + (ell_m,)
        corrects = corrects + (m_target == m_max,)

    total = tl.exp2((ell_s - top) * LOG2E)
    for m in tl.static_range(M):
        total += tl.exp2((ells[m] - top) * LOG2E)
    over_total = 1.0 / total
    share_s = share_of(ell_s, top, over_total, share_scale)
    shares = ()
    actives = ()
    taus_m = ()
    taus_s = ()
    weights = ()
    for m in tl.static_range(M):
        share_m = share_of(ells[m], top, over_total, share_scale)
        active, tau_m, tau_s = plan_lesson(
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
        weight = lesson_weight(
            tau_m, share_m, mentors_weight, mentor_weight_ptr, m, M, RANK_WEIGHTING
        )
        shares = shares + (share_m,)
        actives = actives + (active,)
        taus_m = taus_m + (tau_m,)
        taus_s = taus_s + (tau_s,)
        weights = weights + (weight,)

    # Second sweep: the lessons of those who teach, _GROUP mentors at a time.
    kls = ()
    pulls_m = ()  # weight / Σ e_m and weight / Σ e_s, which the gradient needs
    pulls_s = ()
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
            loss += weighted_lesson(actives[m], weights[m], taus_s[m], kl)
            kls = kls + (kl,)
            pulls_m = pulls_m + (tl.where(actives[m], weights[m] / sum_m, 0.0),)
            pulls_s = pulls_s + (tl.where(actives[m], weights[m] / sum_s, 0.0),)

    # Third sweep: the gradient.
    if grad_ptr is not None:
        pull_t = task * t_sum / s_sum
        for start in range(0, C, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = (column < C)[None, :]
            z_s = load_tile(student_ptr, student_stride, row, column, inside, ALIGN)
            d_s = z_s - s_max[:, None]
            e = tl.exp2(d_s * LOG2E)
            t = load_targets(
                target_ptr, target_stride, label_smoothing, row, column, inside, target, C, ALIGN
            )
            grad = e * pull_t[:, None] - t * task[:, None]
            for m in tl.static_range(M):
                if tl.max(actives[m].to(tl.int32), 0) > 0:
                    z_m = load_tile(mentor_ptrs[m], mentor_strides[m], row, column, inside, ALIGN)
                    e_m = tl.exp2(exponents(z_m - maxima[m][:, None], taus_m[m]))
                    e_s = tl.exp2(exponents(d_s, taus_s[m]))
                    grad += e_s * pulls_s[m][:, None]
                    grad -= e_m * pulls_m[m][:, None]
            if FINISHED_GRAD:
                grad = finished(grad, scale_ptr, n_valid, MEAN)
            store_grad(grad_ptr, grad, row, column, inside, valid, sick, C)

    store_row_loss(lines_ptr, row, n_rows, valid, sick, loss)
    if report_ptr is not None:
        for m in tl.static_range(M):
            store_lesson(
                lines_ptr, m, M, row, n_rows, valid, actives[m], shares[m], taus_m[m], kls[m]
            )
        store_student(lines_ptr, M, row, n_rows, valid, sick, ell_s, own_ell)
    if count_ptr is not None:
        finish(
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
            M,
            MEAN,
            COUNTED,
            BLOCK_LINES,
            BLOCK_R,
        )
