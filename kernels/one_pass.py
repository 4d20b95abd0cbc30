"""One pass over student and mentors: every row's loss and its gradient.

For a row b with student logits z_s, mentor logits z_1 … z_M and target distribution t, with k in
s, 1 … M (symbols are defined in ``classroomkd/loss/definition.py``):

    ℓ_k  = Σ_c t_c (z_k[c] − max z_k) − Σ_c t_c · log Σ_c exp(z_k[c] − max z_k)
    r_m  = M · exp(ℓ_m) / Σ_j exp(ℓ_j)
    Δ_m  = 1 − exp(−|ℓ_m − ℓ_s|)
    loss = a_s · (−ℓ_s) + Σ_m active_m g_m r_m τ_m² KL_m

The temperature softmaxes need no new maxima, since max(z/τ) = max(z)/τ. With
u_k = (z_k − max z_k)/τ, e_k = exp(u_k) and S_k = Σ_c e_k[c]

    KL_m = Σ_c (e_m/S_m) · ((u_m − log S_m) − (u_s − log S_s))
         = (1/S_m) Σ_c e_m · (u_m − u_s) − log(S_m/S_s),

three sums in one sweep; if student and mentor agree, the logarithm's argument is near 1, so
nothing cancels. Differentiating, with the weights held constant,

    ∂loss/∂z_s = a_s (softmax(z_s) Σ_c t − t) + Σ_m active_m g_m r_m τ_m (e_s/S_s − e_m/S_m).

Between the two halves (all ℓ_k must be known before any r_m) the rows stay in registers
(``held.py``) or are read again (``swept.py``, and ``positions.py`` for dense logits). Exponentials
are powers of two, of v = u · log2(e); sums in log2 units are multiplied by ln 2 at the end.

Each program stores the sums of its rows' losses and, for a report, statistics; the last one adds
them up (``batch.py``). So one launch computes the batch's loss, with the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from classroomkd.kernels.batch import (
    count_slices,
    gradient_factor,
    report_kd,
    report_weights,
    store_batch,
    store_lanes,
    store_stat,
    sum_batch,
)
from classroomkd.kernels.blocks import MAX_MENTORS_APART
from classroomkd.kernels.device import divergence, floored
from classroomkd.kernels.held import held_confidences, held_kd_sums, store_held_gradient
from classroomkd.kernels.kd import one_step_kd, store_row_gradient, swept_gradient, swept_kd_sums
from classroomkd.kernels.pieces import load_classes, load_pieces, load_student, targets_of
from classroomkd.kernels.positions import (
    place_of,
    position_confidences,
    position_gradient,
    position_kd_sums,
)
from classroomkd.kernels.ranks import gate_and_temperature, kd_terms, task_loss
from classroomkd.kernels.swept import row_begins, strides_of, swept_confidences
from classroomkd.kernels.tiles import tile_begins, tile_confidences, tile_gradient, tile_kd_sums


@triton.jit(
    do_not_specialize=[
        *("n_rows", "group_shift", "ignore_index"),
        *("n_positions", "image_factor", "image_shift"),
    ]
)
def classroom_kernel(
    student_ptr,  # [B, C] of any row stride; or [B, C, P], positions adjacent in memory
    mentor_ptrs,  # M of the same
    target_ptr,  # class indices, one a row; or probabilities, as the logits
    row_weight_ptr,  # float32, one a row, or None for 1
    mentor_weight_ptr,  # [M], or None for 1
    ell_sums_ptr,  # [M + 2], computed with SUMS, or None for ranking "sample"
    scale_ptr,  # one number, or None for 1
    weight_sum_ptr,  # float32 [], Σ row weights, or None to divide a mean by the valid rows
    stats_ptr,  # float32 [programs + groups, N_STATS], or None if nothing is summed
    grad_ptr,  # of the student's shape, contiguous, or None
    loss_ptr,  # float32 [], or one a row for reduction "none"; with SUMS [M + 2]
    count_ptr,  # float32 [], what a mean is divided by, or None
    report_ptr,  # float32 [3 + 4M], or None
    state_ptr,  # int64, 0: see ``batch.py``; None if nothing is summed
    student_stride,  # of rows or of images, in units of ALIGN elements
    mentor_strides,  # M, likewise but negative, or None if all are the student's
    target_stride,  # likewise; None for class indices
    n_positions,  # P; None for rows, as are the next two
    image_factor,  # row · factor >> shift is row / P, for rows below 2³¹
    image_shift,
    n_rows: tl.int32,  # B, or B · P
    group_shift: tl.int32,  # 2 to this power are the programs per group of sums
    temperature,
    weight_scale,  # multiplies every mentor's term
    task_weight,  # a_s, or None for the student's confidence
    label_smoothing,  # or None
    share_scale,  # 10 to the power of rank_decimals, or None for no rounding
    ignore_index,  # int32, or int64 if it does not fit
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns of a piece, or of a sweep's step
    PIECES: tl.constexpr,  # that hold a row; 0 to sweep
    LOADS: tl.constexpr,  # of a row, in a thread and step
    V: tl.constexpr,  # columns a load
    KEEP_STUDENT: tl.constexpr,  # in registers, in one step
    ROWS: tl.constexpr,  # a program's
    K: tl.constexpr,  # lanes, at least M + 1
    ALIGN: tl.constexpr,
    MIXED: tl.constexpr,  # logits of several dtypes
    N_STATS: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KNOWLEDGE_FILTER: tl.constexpr,
    MENTORING: tl.constexpr,
    WEIGHTING: tl.constexpr,
    REDUCTION: tl.constexpr,
    SCALE_GRAD: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Loss, gradient and report of a batch. An argument that is None costs nothing.

    The gradient is that of each row's unweighted loss; with SCALE_GRAD it is that of the batch's
    loss, times the scale. With SUMS, for ranking "batch", the only outputs are Σ_b ℓ_k over the
    valid rows, the student's first, and the number of these rows.
    """
    M: tl.constexpr = len(mentor_ptrs)
    SOFT: tl.constexpr = target_stride is not None
    ONE_CLASS: tl.constexpr = (not SOFT) and (label_smoothing is None)
    DENSE: tl.constexpr = n_positions is not None
    HELD: tl.constexpr = PIECES > 0
    TILED: tl.constexpr = (M > MAX_MENTORS_APART) and (not HELD) and (not DENSE)
    ONE_STEP: tl.constexpr = (BLOCK_C >= C) and (not HELD) and (not DENSE) and (not TILED)
    SAME_TAU: tl.constexpr = MENTORING != "dtkd"
    sweep_confidences: tl.constexpr = tile_confidences if TILED else swept_confidences
    sweep_kd_sums: tl.constexpr = tile_kd_sums if TILED else swept_kd_sums
    sweep_gradient: tl.constexpr = tile_gradient if TILED else swept_gradient
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < n_rows
    lane = tl.arange(0, K)[None, :]
    ptrs = (student_ptr,) + mentor_ptrs
    strides = strides_of(student_stride, mentor_strides, M)

    # First half: all log-confidences.
    labels = (target_ptr, target_stride, label_smoothing, ignore_index)
    if HELD:
        column = tl.arange(0, BLOCK_C)[None, None, :]
        # Rows beyond the batch read its last row; nothing of theirs is stored. Logits and class
        # indices, and up to 512 rows' targets for the count, are loaded before any of it is used.
        read = tl.minimum(row, n_rows - 1)
        pieces = load_pieces(ptrs, strides, read, lane, column, C, PIECES, ALIGN, MIXED)
        students = load_student(ptrs, strides, read, lane, column, C, PIECES, ALIGN)
        classes = load_classes(labels, read, n_rows)
    elif DENSE:
        place = place_of(row, n_positions, image_factor, image_shift)
    else:
        if TILED:
            begins = tile_begins(ptrs, strides, row, lane, ALIGN, MIXED)
        else:
            begins = row_begins(ptrs, strides, tl.sum(row), ALIGN)
        target_begin = target_ptr + tl.sum(row)
        if SOFT:
            target_begin = row_begins((target_ptr,), (target_stride,), tl.sum(row), ALIGN)[0]
        labels = (target_begin, label_smoothing, ignore_index)
    counting = (state_ptr, target_ptr, ignore_index, n_rows)
    count = None
    if SCALE_GRAD and REDUCTION == "mean" and not SOFT and weight_sum_ptr is None:
        count = count_slices(*counting, HELD)  # swept rows have registers to spare here
    if HELD:
        valid, out_of_range, target, ts, t_sum = targets_of(
            labels, classes, read, mask, lane, column, C, PIECES, ALIGN
        )
        row_ell, maxima, e_sum, d_target, ds = held_confidences(
            pieces, ts, target, t_sum, lane, column, M, ONE_CLASS
        )
    elif DENSE:
        row_ell, maxima, e_sum, d_target, valid, out_of_range, target, t_sum = position_confidences(
            ptrs, strides, labels, place, lane, mask, C, BLOCK_C, MIXED
        )
    else:
        row_ell, maxima, e_sum, d_target, valid, out_of_range, target, t_sum = sweep_confidences(
            begins, labels, lane, C, BLOCK_C, LOADS, V, SOFT, MIXED
        )

    if SUMS:
        ell = tl.where(out_of_range[:, None], float("nan"), floored(row_ell))
        ell = tl.where(valid[:, None], ell, 0.0)
        store_stat(stats_ptr, 0, tl.sum(tl.where(lane == 0, ell, 0.0), 1), N_STATS)
        store_stat(stats_ptr, 1, valid.to(tl.float32), N_STATS)
        store_lanes(stats_ptr, 2, ell, lane, M, N_STATS)
    else:
        confidence, task, nonfinite, share, active, tau_m, tau_s, weight = gate_and_temperature(
            (row_ell, maxima, d_target, valid, out_of_range, lane),
            (ell_sums_ptr, mentor_weight_ptr),
            (temperature, weight_scale, task_weight, share_scale),
            M,
            KNOWLEDGE_FILTER,
            MENTORING,
            WEIGHTING,
        )

        if report_ptr is not None:
            own_ell = tl.sum(tl.where(lane == 0, row_ell, 0.0), 1)
            of_row = (tl.sum(confidence, 1), tl.where(nonfinite, float("nan"), -own_ell))
            report_weights(stats_ptr, lane, valid, (active, share, tau_m), of_row, M, N_STATS)

        # Second half: the terms of the active mentors.
        kd_inputs = (maxima, tau_m, tau_s, active, lane)
        if HELD:
            sum_m, sum_s, cross, es_m, es_s = held_kd_sums(ds, students, kd_inputs, SAME_TAU)
        elif DENSE:
            sum_m, sum_s, cross = position_kd_sums(
                ptrs, strides, place, kd_inputs, mask, C, BLOCK_C, SAME_TAU, MIXED
            )
        elif ONE_STEP:
            own = (task, t_sum, e_sum)
            sum_m, sum_s, cross, row_grad = one_step_kd(
                begins, kd_inputs, weight, own, n_rows, C, BLOCK_C, LOADS, V, KEEP_STUDENT, SAME_TAU
            )
        else:
            sum_m, sum_s, cross = sweep_kd_sums(begins, kd_inputs, C, BLOCK_C, LOADS, V, SAME_TAU)
        kl = tl.where(active, divergence(cross, tau_m, sum_m, sum_s), 0.0)
        mentor_loss = tl.sum(kd_terms(active, weight, tau_s, kl), 1)
        own_ell = tl.sum(tl.where(lane == 0, row_ell, 0.0), 1)
        loss = task_loss(tl.sum(task, 1), own_ell) + mentor_loss
        loss = tl.where(nonfinite, float("nan"), loss)
        row_weight = tl.full([ROWS], 1.0, tl.float32)
        if row_weight_ptr is not None:
            row_weight = tl.load(row_weight_ptr + row, mask=mask, other=0.0)
        loss = tl.where(valid, loss * row_weight, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + row, loss, mask=mask)
        if stats_ptr is not None:
            store_stat(stats_ptr, 0, loss, N_STATS)
            store_stat(stats_ptr, 1, valid.to(tl.float32), N_STATS)
        if report_ptr is not None:
            of_nonfinite = tl.where(nonfinite, float("nan"), mentor_loss)
            report_kd(stats_ptr, lane, valid, kl, of_nonfinite, M, N_STATS)
        if grad_ptr is not None:
            factor = tl.full([ROWS], 1.0, tl.float32)
            if SCALE_GRAD:
                factor = row_weight * gradient_factor(
                    scale_ptr, weight_sum_ptr, counting, count, REDUCTION == "mean", HELD
                )
            of_rows = (task, factor, valid, nonfinite)
            if not ONE_STEP:
                # Lane 0 has the cross-entropy's own softmax, to be added.
                coef_m = tl.where(lane == 0, -task * t_sum / e_sum, 0.0)
                coef_m = tl.where(active, weight / sum_m, coef_m)
                coef_s = tl.where(active, weight / sum_s, 0.0)
            if HELD:
                where = (row, target, lane, column, n_rows)
                store_held_gradient(
                    grad_ptr, (es_m, es_s), (coef_m, coef_s), labels, of_rows, where, C, ALIGN
                )
            elif DENSE:
                position_gradient(
                    grad_ptr,
                    ptrs,
                    strides,
                    labels,
                    of_rows,
                    place,
                    kd_inputs,
                    (coef_m, coef_s),
                    target,
                    mask,
                    C,
                    BLOCK_C,
                    SAME_TAU,
                    MIXED,
                )
            elif ONE_STEP:
                store_row_gradient(
                    grad_ptr, row_grad, labels, of_rows, row, target, C, BLOCK_C, V, SOFT
                )
            else:
                sweep_gradient(
                    grad_ptr,
                    begins,
                    labels,
                    of_rows,
                    kd_inputs,
                    (coef_m, coef_s),
                    row,
                    target,
                    C,
                    BLOCK_C,
                    V,
                    SOFT,
                    SAME_TAU,
                )
    if stats_ptr is not None:
        last, sums = sum_batch(stats_ptr, state_ptr, group_shift, N_STATS, BLOCK_STATS, BLOCK_R)
        if last:
            if SUMS:
                stat = tl.arange(0, BLOCK_STATS)
                number = tl.where(stat == 0, 0, tl.where(stat == 1, M + 1, stat - 1))
                tl.store(loss_ptr + number, sums, mask=stat < N_STATS)
            else:
                results = (loss_ptr, count_ptr, report_ptr)
                store_batch(
                    sums, results, weight_sum_ptr, state_ptr, M, REDUCTION, N_STATS, BLOCK_STATS
                )
