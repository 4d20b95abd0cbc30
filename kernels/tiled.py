"""Rows too long for registers: the pass of ``classroom.py`` in three sweeps over tiles.

The mathematics is the same. The first sweep takes each row's confidence with a running maximum

    S ← S · exp(max_old − max_new) + Σ_tile exp(z − max_new),

the second the sums of the temperature softmaxes and of the KL, with the maxima known, the third
the gradient. Each sweep reads the M + 1 rows; the last writes one: (3M + 4) · C logits a row. In
the second the running sums of _GROUP mentors share the registers, and for every further _GROUP the
student's row is read once more.
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
    finish,
    finished,
    floored,
    is_last_program,
    lesson_weight,
    load_column,
    load_tile,
    plan_lesson,
    share_of,
    smoothed,
    store_grad,
    store_lesson,
    store_line,
    store_row_loss,
    store_student,
    sum_lines,
    task_loss,
    task_weights,
    valid_rows,
)

_GROUP = tl.constexpr(4)


@triton.jit
def _load_targets(
    target_ptr,
    target_stride,
    label_smoothing,
    row,
    column,
    inside,
    target,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """t [1, BLOCK_C] of one tile."""
    if target_stride is None:
        t = tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    else:
        offsets = (row * ALIGN)[:, None] * target_stride + column[None, :]
        t = tl.load(target_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return smoothed(t, label_smoothing, inside, C)


@triton.jit
def _scan_targets(
    target_ptr,
    target_stride,
    label_smoothing,
    ignore_index,
    row,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Whether the row counts, whether it names no class, its target class (0 where there is none),
    and Σ_c t(c); [1].
    """
    if target_stride is None:
        index = tl.load(target_ptr + row).to(tl.int64)
        valid = index != ignore_index
        out_of_range = (index < 0) | (index >= C)
        target = tl.where(out_of_range, 0, index).to(tl.int32)
        t_sum = tl.zeros([1], tl.float32) + 1.0
    else:
        valid = row >= 0
        out_of_range = row < 0
        best = tl.full([1], -float("inf"), tl.float32)
        target = tl.zeros([1], tl.int32)
        t_sum = tl.zeros([1], tl.float32)
        for start in range(0, C, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            inside = (column < C)[None, :]
            offsets = (row * ALIGN)[:, None] * target_stride + column[None, :]
            t = tl.load(target_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            tile_best = tl.max(tl.where(inside, t, -float("inf")), 1)
            at = tl.min(tl.where(inside & (t == tile_best[:, None]), column[None, :], C), 1)
            target = tl.where(tile_best > best, at, target)
            best = tl.maximum(best, tile_best)
            t_sum += tl.sum(smoothed(t, label_smoothing, inside, C), 1)
    return valid, out_of_range, target, t_sum


@triton.jit
def _scan_row(
    ptr,
    stride,
    target_ptr,
    target_stride,
    label_smoothing,
    row,
    target,
    t_sum,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """ℓ, max z, Σ exp(z − max z) and the target class's logit of a row; each [1]."""
    z_max = tl.full([1], -float("inf"), tl.float32)
    shift = tl.zeros([1], tl.float32)  # what stands for max z: 0 while every class is ruled out
    e_sums = tl.zeros([1, BLOCK_C], tl.float32)
    picked = tl.zeros([1], tl.float32)  # Σ t · v over the tiles so far
    seen = tl.zeros([1], tl.float32)  # Σ t over the tiles so far
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = (column < C)[None, :]
        z = load_tile(ptr, stride, row, column, inside, ALIGN)
        new_max = tl.maximum(z_max, tl.max(z, 1))
        new_shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        lower = tl.where(z_max == -float("inf"), 0.0, (shift - new_shift) * LOG2E)
        v = (z - new_shift[:, None]) * LOG2E
        e_sums = e_sums * tl.exp2(lower)[:, None] + tl.exp2(v)
        if (target_stride is not None) or (label_smoothing is not None):
            t = _load_targets(
                target_ptr,
                target_stride,
                label_smoothing,
                row,
                column,
                inside,
                target,
                C,
                ALIGN,
            )
            picked += seen * lower + tl.sum(tl.where(t > 0.0, t * v, 0.0), 1)
            seen += tl.sum(t, 1)
        z_max = new_max
        shift = new_shift
    e_sum = tl.sum(e_sums, 1)
    z_target = load_column(ptr, stride, row, target, row + 1, ALIGN)
    if (target_stride is None) and (label_smoothing is None):
        ell = z_target - z_max - tl.log2(e_sum) * LN2
    else:
        ell = (picked - t_sum * tl.log2(e_sum)) * LN2
    # A row without any class has no distribution; single-pass, −inf − −inf says so.
    ell = tl.where(z_max == -float("inf"), float("nan"), ell)
    return ell, z_max, e_sum, z_target


@triton.jit
def _row_max(ptr, stride, row, C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr):
    """max z of a row, [1]; the tiles are joined column by column.

    Triton 3.7 fails to compile a loop that does nothing but carry the maximum of each tile on.
    """
    z_max = tl.full([1, BLOCK_C], -float("inf"), tl.float32)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = (column < C)[None, :]
        z_max = tl.maximum(z_max, load_tile(ptr, stride, row, column, inside, ALIGN))
    return tl.max(z_max, 1)


@triton.jit
def tiled_confidence_kernel(
    student_ptr,
    mentor_ptrs,
    target_ptr,
    ell_ptr,
    sums_ptr,
    counter_ptr,
    student_stride,
    mentor_strides,
    target_stride,
    n_rows,
    label_smoothing,
    ignore_index,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`confidence_kernel`, one row a program."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    valid, out_of_range, target, t_sum = _scan_targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, C, BLOCK_C, ALIGN
    )
    M: tl.constexpr = len(mentor_ptrs)
    for k in tl.static_range(M + 1):
        if k == 0:
            ptr, stride = student_ptr, student_stride
        else:
            ptr, stride = mentor_ptrs[k - 1], mentor_strides[k - 1]
        ell, _, _, _ = _scan_row(
            ptr,
            stride,
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
        ell = tl.where(out_of_range, float("nan"), floored(ell))
        store_line(ell_ptr, k, row, n_rows, tl.where(valid, ell, 0.0))
    store_line(ell_ptr, M + 1, row, n_rows, valid.to(tl.float32))
    if is_last_program(counter_ptr):
        line = tl.arange(0, BLOCK_LINES)
        sums = sum_lines(ell_ptr, n_rows, M + 2, BLOCK_LINES, BLOCK_R)
        tl.store(sums_ptr + line, sums, mask=line < M + 2)


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
    valid, out_of_range, target, t_sum = _scan_targets(
        target_ptr, target_stride, label_smoothing, ignore_index, row, C, BLOCK_C, ALIGN
    )
    M: tl.constexpr = len(mentor_ptrs)
    COUNTED: tl.constexpr = FINISHED_GRAD and MEAN
    n_valid = 1.0
    if COUNTED:
        n_valid = valid_rows(n_valid_ptr, target_ptr, target_stride, ignore_index, n_rows)

    # First sweep: everyone's confidence.
    own_ell, s_max, s_sum, _ = _scan_row(
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
            ell_m, m_max, _, m_target = _scan_row(
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
            m_max = _row_max(mentor_ptrs[m], mentor_strides[m], row, C, BLOCK_C, ALIGN)
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
        weight = lesson_weight(tau_m, share_m, mentor_weight_ptr, m, M, RANK_WEIGHTING)
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
        for _ in tl.static_range(first, min(first + _GROUP, M)):
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
            for m in tl.static_range(first, min(first + _GROUP, M)):
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
        for m in tl.static_range(first, min(first + _GROUP, M)):
            sum_m = tl.sum(parts_m[m - first], 1)
            cross = tl.sum(parts_cross[m - first], 1)
            sum_s = tl.sum(parts_s[m - first], 1)
            kl = tl.where(actives[m], divergence(cross, sum_m, sum_s), 0.0)
            loss += tl.where(actives[m], weights[m] * taus_s[m] * kl, 0.0)
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
            t = _load_targets(
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
