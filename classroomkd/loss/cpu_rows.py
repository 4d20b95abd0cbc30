"""The fused pass over rows on a CPU, compiled by numba: what ``kernels/one_pass.py`` is to a GPU.

The formulas are there. What is done for each class is in ``cpu_vectors.py``; what a row has once,
or once a mentor, is float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from classroomkd.compiled import compiled
from classroomkd.loss import cpu_vectors as vectors

ADAPTIVE, FIXED, DTKD = range(3)
"""Mentorings; none is a fixed temperature of 1."""
BY_RANK, UNIFORM, BY_CONFIDENCE = range(3)
"""Weightings."""

_KEPT = 2**16  # numbers that stay in the cache from a row's first half to its second
_LOG2E, _LN2 = np.float32(1 / math.log(2)), math.log(2)
_FLOOR = -3.4028234663852886e38  # log-confidence of a probability of exactly 0
_MIN_TAU = 1e-20  # nothing is softened any more, and logits over it are finite
_ZERO, _ONE = np.float32(0), np.float32(1)

_entry = compiled(vectors.__file__, error_model="numpy")


@vectors.exact
def _smoothed(t, label_smoothing, n_classes):
    """Smooth class probabilities where they are."""
    keep, share = np.float32(1 - label_smoothing), np.float32(label_smoothing / n_classes)
    for i in range(n_classes):
        t[i] = keep * t[i] + share


@vectors.exact
def _target(address, kind, index, label_smoothing, n_classes, t):
    """The class and the distribution t of a row; t is not written for one class alone."""
    if address == 0:
        if label_smoothing > 0:
            t[:] = 0
            t[index] = 1
            _smoothed(t, label_smoothing, n_classes)
        return index
    t[:] = vectors.row(address, kind, n_classes, t)
    most, target = vectors.largest(t[:n_classes]), 0
    while target < n_classes - 1 and t[target] != most:
        target += 1
    if label_smoothing > 0:
        _smoothed(t, label_smoothing, n_classes)
    return target


@vectors.exact
def _floored(ell):
    return _FLOOR if ell < _FLOOR else ell


@vectors.exact
def _confidence(z, top, e_sum, one_class, target, t):
    """ℓ of a row, −inf kept, and Σ t."""
    if one_class:
        return (np.float64(z[target]) - np.float64(top)) - math.log(e_sum), 1.0
    expected, t_sum = vectors.expected(t, z, top)
    return expected - t_sum * math.log(e_sum), t_sum


@_entry
def survey(targets, n_rows, ignore_index, n_classes):
    """How many rows count; and the first whose class index names no class, or −1.

    ``targets`` is the address of class indices, int64 [B].
    """
    indices = carray(vectors.pointer(targets), n_rows, np.int64)
    n_valid, bad = 0, -1
    for b in range(n_rows):
        n_valid += indices[b] != ignore_index
        if indices[b] != ignore_index and not 0 <= indices[b] < n_classes and bad < 0:
            bad = b
    return n_valid, bad


@_entry
def confidences(first, last, table, targets, n_classes, label_smoothing, ignore_index, ells):
    """For ranking "batch", of rows from ``first`` to ``last``: ℓ_k into ells [B, K].

    The other arguments are those of `rows`.
    """
    logits, probabilities = table[:-2], table[-2]
    one_class = probabilities[0] == 0 and label_smoothing == 0
    scratch = np.empty((3, n_classes), np.float32)
    row, e, t = scratch[0], scratch[1], scratch[2]
    indices = carray(vectors.pointer(targets), last if targets else 0, np.int64)
    for b in range(first, last):
        index = indices[b] if targets else 0
        if targets and index == ignore_index:
            ells[b] = 0
            continue
        at = probabilities[0] + b * probabilities[1]
        target = _target(at, probabilities[2], index, label_smoothing, n_classes, t)
        for k in range(len(logits)):
            # Copied if it lies elsewhere: the compiler may sum rows in place in another order, and
            # equal rows of different dtypes must be equal in rank.
            z = vectors.row(logits[k, 0] + b * logits[k, 1], logits[k, 2], n_classes, row)
            for i in range(n_classes):
                row[i] = z[i]
            top = vectors.largest(row)
            e_sum = vectors.exponentials(row, top, _LOG2E, e)
            ells[b, k] = _floored(_confidence(row, top, e_sum, one_class, target, t)[0])


@vectors.exact
def _lead(ell_m, ell_s, share_m, share_s, rounded):
    """Δ_m."""
    if not rounded:
        return 1 - math.exp(-abs(ell_m - ell_s))
    largest = max(share_m, share_s)
    return abs(share_m - share_s) / largest if largest > 0 else 0.0


@vectors.exact
def _temperatures(mentoring, temperature, lead, top_s, top_m):
    """The mentor's temperature and the student's."""
    tau_m = tau_s = temperature
    if mentoring == ADAPTIVE:
        tau_m = tau_s = 1 + temperature * lead
    elif mentoring == DTKD and top_s > 0 and top_m > 0:
        tau_m, tau_s = 2 * temperature / (1 + top_s / top_m), 2 * temperature / (1 + top_m / top_s)
    return max(tau_m, _MIN_TAU), max(tau_s, _MIN_TAU)


@vectors.exact
def _shares(ell, share_scale, shares):
    """exp(ℓ_k) / Σ_j exp(ℓ_j), rounded on request."""
    most, total = ell[0], 0.0
    for k in range(1, len(ell)):
        most = max(most, ell[k])
    for k in range(len(ell)):
        shares[k] = math.exp(ell[k] - most)
        total += shares[k]
    for k in range(len(ell)):
        shares[k] /= total
        if share_scale > 0:
            shares[k] = np.rint(shares[k] * share_scale) / share_scale


@vectors.exact
def _weigh(weighting, ell, shares, ranks):
    """What multiplies each mentor's term: its rank, CA-MKD's weight, or 1."""
    M = len(ranks)
    if weighting == BY_CONFIDENCE and M > 1:
        _shares(-ell[1:], 0.0, ranks)
    for m in range(M):
        if weighting == BY_RANK:
            ranks[m] = M * shares[m + 1]
        elif weighting == UNIFORM or M == 1:
            ranks[m] = 1.0
        else:
            ranks[m] = (1 - ranks[m]) / (M - 1)


@_entry
def rows(
    first,
    last,
    table,
    targets,
    row_weights,
    ell_sums,
    weights,
    n_classes,
    label_smoothing,
    ignore_index,
    temperature,
    task_weight,
    share_scale,
    needs_better,
    needs_correct,
    mentoring,
    weighting,
    factor,
    weighs_grad,
    losses,
    stats,
):
    """The loss, the gradient and the statistics of rows from ``first`` to ``last``.

    Args:
        table: int64 [K + 2, 3]: address, bytes from row to row and kind of the student's logits,
            of each mentor's, of the class probabilities and of the gradient; address 0 for what
            there is not.
        targets: the address of class indices, int64 [B], or 0.
        row_weights: float64 [B], what multiplies each row's loss; or [0].
        ell_sums: float32 [M + 2], the sums of ℓ and the valid rows for ranking "batch", or [0].
        weights: float64 [M], what multiplies each mentor's term.
        task_weight: a_s, or NaN for the student's confidence.
        share_scale: 10 to the power of rank_decimals, or 0.
        needs_better, needs_correct: the filter, each 0 or 1.
        factor: multiplies the gradient; with ``weighs_grad`` 1, so does the row's weight.
        losses: float32 [B], written to.
        stats: float32 [B, 4M + 3], written to in the order of ``kernels/report_layout.py``; or
            [0, 0].
    """
    logits, probabilities, out = table[:-2], table[-2], table[-1]
    K = len(logits)
    M = K - 1
    keep = K * n_classes <= _KEPT
    one_class = probabilities[0] == 0 and label_smoothing == 0
    with_grad = out[0] != 0
    shape = 4 + (K if keep else 2), n_classes
    memory = np.empty(shape, np.float32)
    scratch = carray(vectors.pointer(memory.ctypes.data), shape, np.float32)  # not counted
    e_s, e_m, t, grad, kept = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4:]
    indices = carray(vectors.pointer(targets), last if targets else 0, np.int64)
    n_stats = stats.shape[1]
    tops = np.empty(K, np.float32)
    ell, shares, ranks = np.empty(K), np.empty(K), np.empty(M)
    correct = np.empty(K, np.bool_)

    for b in range(first, last):
        grad_at = out[0] + b * out[1]
        if with_grad and out[2] == vectors.FLOAT32:
            grad = carray(vectors.pointer(grad_at), n_classes, np.float32)
        index = indices[b] if targets else 0
        if targets and index == ignore_index:
            losses[b] = 0
            for i in range(n_stats):
                stats[b, i] = 0
            if with_grad:
                grad[:] = 0
                vectors.store(grad, _ONE, grad_at, out[2], n_classes)
            continue
        at = probabilities[0] + b * probabilities[1]
        target = _target(at, probabilities[2], index, label_smoothing, n_classes, t)

        # First half: all log-confidences.
        z_s = t
        row_ell = t_sum = s_sum = 0.0
        nonfinite = False
        for k in range(K):
            into = kept[k if keep else min(k, 1)]
            z = vectors.row(logits[k, 0] + b * logits[k, 1], logits[k, 2], n_classes, into)
            tops[k] = vectors.largest(z)
            correct[k] = z[target] == tops[k]
            if k == 0 or len(ell_sums) == 0:
                e_sum = vectors.exponentials(z, tops[k], _LOG2E, e_m if k else e_s)
                ell[k], t_sum = _confidence(z, tops[k], e_sum, one_class, target, t)
            if k == 0:
                z_s, s_sum, row_ell, nonfinite = z, e_sum, ell[0], math.isnan(ell[0])
            if len(ell_sums):
                ell[k] = np.float64(ell_sums[k]) / max(ell_sums[K], _ONE)
            ell[k] = _floored(ell[k])
            nonfinite |= math.isnan(ell[k])
        _shares(ell, share_scale, shares)
        _weigh(weighting, ell, shares, ranks)
        task = math.exp(ell[0]) if math.isnan(task_weight) else task_weight
        loss = 0.0 if task == 0 else task * -row_ell
        if with_grad:
            vectors.begin_gradient(grad, e_s, np.float32(task * t_sum / s_sum))
            if one_class:
                grad[target] -= np.float32(task)
            else:
                vectors.add_difference(grad, t, np.float32(-task), t, _ZERO)

        # Second half: the terms of the active mentors.
        mentor_loss, last_tau = 0.0, math.nan
        for m in range(M):
            k = m + 1
            lead = _lead(ell[k], ell[0], shares[k], shares[0], share_scale > 0)
            better = shares[k] >= shares[0] if share_scale > 0 else ell[k] >= ell[0]
            active = (better or not needs_better) and (correct[k] or not needs_correct)
            tau_m, tau_s = _temperatures(mentoring, temperature, lead, tops[0], tops[k])
            kl = 0.0
            if active:
                z_m = kept[k if keep else 1]
                if not keep or logits[k, 2] == vectors.FLOAT32:  # or it has been converted
                    z_m = vectors.row(logits[k, 0] + b * logits[k, 1], logits[k, 2], n_classes, z_m)
                factor_m, factor_s = np.float32(1 / tau_m) * _LOG2E, np.float32(1 / tau_s) * _LOG2E
                if tau_s != last_tau:
                    s_sum, last_tau = vectors.exponentials(z_s, tops[0], factor_s, e_s), tau_s
                m_sum = vectors.exponentials(z_m, tops[k], factor_m, e_m)
                cross, more = vectors.cross(
                    e_m, z_m, tops[k], factor_m, e_s, z_s, tops[0], factor_s
                )
                near = abs(more) < 0.5 * s_sum
                log_ratio = math.log1p(more / s_sum) if near else math.log(m_sum / s_sum)
                kl = cross / m_sum * _LN2 - log_ratio
                kl = 0.0 if kl < 0 else kl  # which rounding would make it
                weight = weights[m] * ranks[m] * tau_m
                if weight * tau_s != 0:
                    mentor_loss += weight * tau_s * kl
                if with_grad:
                    vectors.add_difference(
                        grad, e_s, np.float32(weight / s_sum), e_m, np.float32(weight / m_sum)
                    )
            if n_stats:
                stats[b, m], stats[b, M + m] = active, M * shares[k]
                stats[b, 2 * M + m], stats[b, 3 * M + m] = tau_m, kl

        row_weight = row_weights[b] if len(row_weights) else 1.0
        losses[b] = math.nan if nonfinite else (loss + mentor_loss) * row_weight
        if n_stats:
            stats[b, 4 * M] = math.exp(ell[0])
            stats[b, 4 * M + 1] = math.nan if nonfinite else -row_ell
            stats[b, 4 * M + 2] = math.nan if nonfinite else mentor_loss
        if with_grad:
            if nonfinite:
                grad[:] = math.nan
            scale = factor * row_weight if weighs_grad else factor
            vectors.store(grad, np.float32(scale), grad_at, out[2], n_classes)
    memory[0, 0] = 0  # numba frees an array after its last use, and all of scratch is in this one


@_entry
def totals(losses, stats, n_valid, count, loss, report):
    """Write the loss [] and the report [4M + 3], or [0], from the numbers of the rows.

    ``count`` is what the loss is divided by.
    """
    total, n_stats = 0.0, len(report)
    for b in range(len(losses)):
        total += losses[b]
    loss[()] = total / count
    sums = np.zeros(n_stats)
    for b in range(len(stats)):
        for i in range(n_stats):
            sums[i] += stats[b, i]
    M = (n_stats - 3) // 4
    for i in range(n_stats):
        # KL is a mean over the rows in which the mentor is active.
        of_kl = 3 * M <= i < 4 * M
        report[i] = sums[i] / (max(sums[i - 3 * M], 1.0) if of_kl else max(n_valid, 1))
