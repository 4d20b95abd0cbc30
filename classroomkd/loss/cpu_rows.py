"""The fused pass over rows on a CPU, compiled by numba: what ``kernels/classroom.py`` is to a GPU.

The formulas are there. All loops over classes are over contiguous float32, without a branch, so
that they become vector instructions; rows of another dtype are converted one at a time into
scratch, and so are short ones, filled up with −inf to a multiple of `_LANES`. What a row has once
or once a mentor is float64.

Sums may be reordered, which vector instructions need (``reassoc``): the order is that of the
machine code, the same for every row of a length, whoever computes it. No other freedom is given
with NaN, infinities or subtractions.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from classroomkd.compiled import compiled

FLOAT32, FLOAT16, BFLOAT16 = range(3)
"""Kinds of logits."""
ADAPTIVE, FIXED, DTKD = range(3)
"""Mentorings; none is a fixed temperature of 1."""
BY_RANK, UNIFORM, BY_CONFIDENCE = range(3)
"""Weightings."""

_LANES = 32  # of an unrolled loop of vectors of eight
_SHORT = 4096  # up to so many classes, what is over after the last full turn costs too much
_KEPT = 2**16  # numbers that stay in the cache from a row's first half to its second
_BLOCK = 2048  # classes that are summed in float32; the blocks' sums are in float64

_f32, _i32, _u32 = np.float32, np.int32, np.uint32
_LOG2E, _LN2 = _f32(1.4426950408889634), math.log(2)
_FLOOR = -3.4028234663852886e38  # log-confidence of a probability of exactly 0
_MIN_TAU = 1e-20  # nothing is softened any more, and logits over it are finite
_INF, _ZERO, _ONE = _f32(np.inf), _f32(0), _f32(1)

# 2^r for −1/2 ≤ r ≤ 1/2, of relative error 2e-9; 8e-8 with the roundings of its evaluation.
_C1, _C2, _C3, _C4, _C5, _C6 = map(
    _f32,
    (
        *(0.6931471824645996, 0.24022647738456726, 0.055503323674201965),
        *(0.00961843691766262, 0.0013398873852565885, 0.00015353361959569156),
    ),
)
# Added to x, it leaves the nearest integer, plus float32's bias of the exponent, in the low bits.
_ROUNDER = _f32(1.5 * 2**23 + 127)
_LEAST = _f32(-127)  # whose power comes out as exactly 0

_exact = njit(error_model="numpy")
_fused = njit(error_model="numpy", fastmath={"contract"})
_summing = njit(error_model="numpy", fastmath={"reassoc", "nsz"})


@intrinsic
def _pointer(context, address):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), build


@_fused
def _power(d, factor):
    """2 to the d · factor, for d ≤ 0; exactly 1 for 0, 0 below 2^-126, NaN for NaN."""
    x = d * factor
    x = _LEAST if x < _LEAST else x
    rounded = x + _ROUNDER
    r = x - (rounded - _ROUNDER)
    p = _C6 * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _C1
    p = p * r + _ONE
    return p * _i32(_f32(rounded).view(np.int32) << _i32(23)).view(np.float32)


@_exact
def _ordered(bits):
    """A float32's bits, ordered as an integer as the number is; its own inverse."""
    return _i32(bits ^ _i32(_i32(bits >> _i32(31)) & _i32(0x7FFFFFFF)))


@_exact
def _largest(z):
    """The largest of a row. A NaN counts as larger or smaller than any number, by its sign."""
    bits = z.view(np.int32)
    most = _i32(-(2**31))
    for i in range(len(bits)):
        candidate = _ordered(bits[i])
        most = _i32(candidate if candidate > most else most)
    return _i32(_ordered(most)).view(np.float32)


@_summing
def _exponentials(z, top, factor, out):
    """Write the softmax numerators of z · factor / log2(e) into ``out`` and return their sum."""
    total = 0.0
    for start in range(0, len(z), _BLOCK):
        row, e = z[start : start + _BLOCK], out[start : start + _BLOCK]
        part = _ZERO
        for i in range(len(row)):
            e[i] = _power(row[i] - top, factor)
            part += e[i]
        total += part
    return total


@_exact
def _expected_term(t, z, top):
    return t * (z - top) if t > _ZERO else _ZERO


@_summing
def _expected(t, z, top):
    """Σ t (z − top) and Σ t; 0 · −inf is 0."""
    total = t_total = 0.0
    for start in range(0, len(z), _BLOCK):
        row, target = z[start : start + _BLOCK], t[start : start + _BLOCK]
        part = t_part = _ZERO
        for i in range(len(row)):
            part += _expected_term(target[i], row[i], top)
            t_part += target[i]
        total += part
        t_total += t_part
    return total, t_total


@_exact
def _cross_term(e_m, z_m, top_m, factor_m, z_s, top_s, factor_s):
    # Not fused: of equal logits the difference must be 0.
    difference = (z_m - top_m) * factor_m - (z_s - top_s) * factor_s
    return e_m * difference if e_m > _ZERO else _ZERO


@_summing
def _cross(e_m, z_m, top_m, factor_m, z_s, top_s, factor_s):
    """Σ e_m (v_m − v_s), v = z · factor; 0 where e_m is 0, whatever the student says."""
    total = 0.0
    for start in range(0, len(e_m), _BLOCK):
        stop = start + _BLOCK
        e, mentor, student = e_m[start:stop], z_m[start:stop], z_s[start:stop]
        part = _ZERO
        for i in range(len(e)):
            part += _cross_term(e[i], mentor[i], top_m, factor_m, student[i], top_s, factor_s)
        total += part
    return total


@_fused
def _begin_gradient(grad, e, weight):
    for i in range(len(grad)):
        grad[i] = e[i] * weight


@_fused
def _add_lesson(grad, e_s, weight_s, e_m, weight_m):
    for i in range(len(grad)):
        grad[i] += weight_s * e_s[i] - weight_m * e_m[i]


@_exact
def _float16(bits):
    """Half precision's bits as float32."""
    magnitude = _u32(_u32(bits & _u32(0x7FFF)) << _u32(13))
    sign = _u32(_u32(bits & _u32(0x8000)) << _u32(16))
    normal = _u32(magnitude + _u32(112 << 23))
    special = _u32(magnitude + _u32(224 << 23))
    # A subnormal's bits, placed below those of 2^-14, less 2^-14.
    small = _u32(magnitude + _u32(113 << 23)).view(np.float32) - _f32(2.0**-14)
    small = _f32(small).view(np.uint32)
    unsigned = _u32(normal if magnitude >= _u32(1 << 23) else small)
    unsigned = _u32(special if magnitude >= _u32(31 << 23) else unsigned)
    return _u32(unsigned | sign).view(np.float32)


@_exact
def _to_float16(value):
    """The nearest half precision's bits, of ties the even one."""
    bits = _f32(value).view(np.uint32)
    sign = _u32(_u32(bits >> _u32(16)) & _u32(0x8000))
    magnitude = _u32(bits & _u32(0x7FFFFFFF))
    odd = _u32(_u32(magnitude >> _u32(13)) & _u32(1))
    rounded = _u32(_u32(magnitude - _u32(112 << 23)) + _u32(_u32(0xFFF) + odd))
    normal = _u32(rounded >> _u32(13))
    # The addition rounds to multiples of 2^-24, the subnormal numbers' unit.
    small = _f32(magnitude.view(np.float32) + _f32(0.5)).view(np.uint32)
    small = _u32(small - _u32(126 << 23))
    half = _u32(small if magnitude < _u32(113 << 23) else normal)
    half = _u32(_u32(0x7C00) if magnitude >= _u32(143 << 23) else half)
    half = _u32(_u32(0x7E00) if magnitude > _u32(255 << 23) else half)
    return np.uint16(_u32(half | sign))


@_exact
def _to_bfloat16(value):
    """The nearest bfloat16's bits, of ties the even one; of a NaN, as arithmetic makes it, too."""
    bits = _f32(value).view(np.uint32)
    odd = _u32(_u32(bits >> _u32(16)) & _u32(1))
    return np.uint16(_u32(_u32(bits + _u32(_u32(0x7FFF) + odd)) >> _u32(16)))


@_exact
def _row(address, kind, n_classes, scratch, filling):
    """A row as float32: where it lies, if that is one and serves, or else in ``scratch``."""
    if kind == FLOAT32:
        row = carray(_pointer(address), n_classes, np.float32)
        if len(scratch) == n_classes:
            return row
        for i in range(n_classes):
            scratch[i] = row[i]
    else:
        bits = carray(_pointer(address), n_classes, np.uint16)
        if kind == FLOAT16:
            for i in range(n_classes):
                scratch[i] = _float16(_u32(bits[i]))
        else:
            into = scratch.view(np.uint32)
            for i in range(n_classes):
                into[i] = _u32(_u32(bits[i]) << _u32(16))
    scratch[n_classes:] = filling
    return scratch


@_exact
def _store(grad, address, kind, n_classes):
    """Write a row of the gradient, unless it is where it belongs."""
    if kind == FLOAT32:
        out = carray(_pointer(address), n_classes, np.float32)
        for i in range(n_classes):
            out[i] = grad[i]
    else:
        bits = carray(_pointer(address), n_classes, np.uint16)
        if kind == FLOAT16:
            for i in range(n_classes):
                bits[i] = _to_float16(grad[i])
        else:
            for i in range(n_classes):
                bits[i] = _to_bfloat16(grad[i])


@_exact
def _width(n_classes, logits):
    """The length of a row in scratch; that of the rows themselves if they serve where they lie."""
    if n_classes > _SHORT and logits[:, 2].max() == FLOAT32:
        return n_classes
    return (n_classes + _LANES - 1) // _LANES * _LANES


@_exact
def _smoothed(t, label_smoothing, n_classes):
    """Smooth class probabilities where they are."""
    keep, share = _f32(1 - label_smoothing), _f32(label_smoothing / n_classes)
    for i in range(n_classes):
        t[i] = keep * t[i] + share


@_exact
def _target(address, kind, index, label_smoothing, n_classes, t):
    """The class and the distribution t of a row; t is not written for one class alone."""
    if address == 0:
        if label_smoothing > 0:
            t[:] = 0
            t[index] = 1
            _smoothed(t, label_smoothing, n_classes)
        return index
    t[:] = _row(address, kind, n_classes, t, _ZERO)
    most, target = _largest(t[:n_classes]), 0
    while target < n_classes - 1 and t[target] != most:
        target += 1
    if label_smoothing > 0:
        _smoothed(t, label_smoothing, n_classes)
    return target


@_exact
def _floored(ell):
    return _FLOOR if ell < _FLOOR else ell


@_exact
def _confidence(z, top, e_sum, one_class, target, t):
    """ℓ of a row, −inf kept, and Σ t."""
    if one_class:
        return (np.float64(z[target]) - np.float64(top)) - math.log(e_sum), 1.0
    expected, t_sum = _expected(t, z, top)
    return expected - t_sum * math.log(e_sum), t_sum


@compiled(error_model="numpy")
def survey(targets, n_rows, ignore_index, n_classes):
    """How many rows count; and the first whose class index names no class, or −1.

    ``targets`` is the address of class indices, int64 [B].
    """
    indices = carray(_pointer(targets), n_rows, np.int64)
    n_valid, bad = 0, -1
    for b in range(n_rows):
        n_valid += indices[b] != ignore_index
        if indices[b] != ignore_index and not 0 <= indices[b] < n_classes and bad < 0:
            bad = b
    return n_valid, bad


@compiled(error_model="numpy")
def confidences(
    first, last, logits, targets, probabilities, n_classes, label_smoothing, ignore_index, ells
):
    """For ranking "batch", of rows from ``first`` to ``last``: ℓ_k into ells [B, K].

    The other arguments are those of `rows`.
    """
    width = _width(n_classes, logits)
    one_class = probabilities[0] == 0 and label_smoothing == 0
    scratch = np.empty((3, width), np.float32)
    row, e, t = scratch[0], scratch[1], scratch[2]
    indices = carray(_pointer(targets), last if targets else 0, np.int64)
    for b in range(first, last):
        index = indices[b] if targets else 0
        if targets and index == ignore_index:
            ells[b] = 0
            continue
        at = probabilities[0] + b * probabilities[1]
        target = _target(at, probabilities[2], index, label_smoothing, n_classes, t)
        for k in range(len(logits)):
            z = _row(logits[k, 0] + b * logits[k, 1], logits[k, 2], n_classes, row, -_INF)
            top = _largest(z)
            e_sum = _exponentials(z, top, _LOG2E, e)
            ells[b, k] = _floored(_confidence(z, top, e_sum, one_class, target, t)[0])


@_exact
def _lead(ell_m, ell_s, share_m, share_s, rounded):
    """Δ_m."""
    if not rounded:
        return -math.expm1(-abs(ell_m - ell_s))
    largest = max(share_m, share_s)
    return abs(share_m - share_s) / largest if largest > 0 else 0.0


@_exact
def _temperatures(mentoring, temperature, lead, top_s, top_m):
    """The mentor's temperature and the student's."""
    tau_m = tau_s = temperature
    if mentoring == ADAPTIVE:
        tau_m = tau_s = 1 + temperature * lead
    elif mentoring == DTKD and top_s > 0 and top_m > 0:
        tau_m, tau_s = 2 * temperature / (1 + top_s / top_m), 2 * temperature / (1 + top_m / top_s)
    return max(tau_m, _MIN_TAU), max(tau_s, _MIN_TAU)


@_exact
def _shares(ell, share_scale, shares):
    """exp(ℓ_k) / Σ_j exp(ℓ_j), rounded on request."""
    most, total = ell.max(), 0.0
    for k in range(len(ell)):
        shares[k] = math.exp(ell[k] - most)
        total += shares[k]
    for k in range(len(ell)):
        shares[k] /= total
        if share_scale > 0:
            shares[k] = np.rint(shares[k] * share_scale) / share_scale


@_exact
def _weigh(weighting, ell, shares, ranks):
    """What multiplies each mentor's term: its rank, CA-MKD's weight, or 1."""
    M = len(ranks)
    if weighting == BY_RANK:
        ranks[:] = M * shares[1:]
    elif weighting == UNIFORM or M == 1:
        ranks[:] = 1
    else:
        _shares(-ell[1:], 0.0, ranks)
        for m in range(M):
            ranks[m] = (1 - ranks[m]) / (M - 1)


@compiled(error_model="numpy")
def rows(
    first,
    last,
    table,
    targets,
    n_classes,
    label_smoothing,
    ignore_index,
    ell_sums,
    weights,
    temperature,
    task_weight,
    share_scale,
    needs_better,
    needs_correct,
    mentoring,
    weighting,
    factor,
    losses,
    stats,
):
    """The loss, the gradient and the statistics of rows from ``first`` to ``last``.

    Args:
        table: int64 [K + 2, 3]: address, bytes from row to row and kind of the student's logits,
            of each mentor's, of the class probabilities and of the gradient; address 0 for what
            there is not.
        targets: the address of class indices, int64 [B], or 0.
        ell_sums: float32 [M + 2], the sums of ℓ and the valid rows for ranking "batch", or [0].
        weights: float64 [M], what multiplies each mentor's term.
        task_weight: a_s, or NaN for the student's confidence.
        share_scale: 10 to the power of rank_decimals, or 0.
        needs_better, needs_correct: the filter, each 0 or 1.
        factor: multiplies the gradient.
        losses: float32 [B], written to.
        stats: float32 [B, 4M + 3], written to in the order of ``kernels/report_layout.py``; or
            [B, 0].
    """
    logits, probabilities, out = table[:-2], table[-2], table[-1]
    K = len(logits)
    M = K - 1
    width = _width(n_classes, logits)
    keep = K * width <= _KEPT
    one_class = probabilities[0] == 0 and label_smoothing == 0
    with_grad, in_place = out[0] != 0, out[2] == FLOAT32 and width == n_classes
    scratch = np.empty((4 + (K if keep else 2), width), np.float32)
    e_s, e_m, t, grad, kept = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4:]
    indices = carray(_pointer(targets), last if targets else 0, np.int64)
    tops = np.empty(K, np.float32)
    ell, shares, ranks = np.empty(K), np.empty(K), np.empty(M)
    correct = np.empty(K, np.bool_)

    for b in range(first, last):
        grad_at = out[0] + b * out[1]
        if with_grad and in_place:
            grad = carray(_pointer(grad_at), n_classes, np.float32)
        index = indices[b] if targets else 0
        if targets and index == ignore_index:
            losses[b] = 0
            stats[b] = 0
            if with_grad:
                grad[:] = 0
                if not in_place:
                    _store(grad, grad_at, out[2], n_classes)
            continue
        at = probabilities[0] + b * probabilities[1]
        target = _target(at, probabilities[2], index, label_smoothing, n_classes, t)

        # First half: all log-confidences.
        z_s = t
        row_ell = t_sum = s_sum = 0.0
        for k in range(K):
            into = kept[k if keep else min(k, 1)]
            z = _row(logits[k, 0] + b * logits[k, 1], logits[k, 2], n_classes, into, -_INF)
            tops[k] = _largest(z)
            correct[k] = z[target] == tops[k]
            if k == 0 or len(ell_sums) == 0:
                e_sum = _exponentials(z, tops[k], _LOG2E, e_m if k else e_s)
                ell[k], t_sum = _confidence(z, tops[k], e_sum, one_class, target, t)
            if k == 0:
                z_s, s_sum, row_ell = z, e_sum, ell[0]
            if len(ell_sums):
                ell[k] = np.float64(ell_sums[k]) / max(ell_sums[K], _ONE)
            ell[k] = _floored(ell[k])
        nonfinite = math.isnan(ell.sum()) or math.isnan(row_ell)
        _shares(ell, share_scale, shares)
        _weigh(weighting, ell, shares, ranks)
        task = math.exp(ell[0]) if math.isnan(task_weight) else task_weight
        loss = 0.0 if task == 0 else task * -row_ell
        if with_grad:
            weight = task * factor
            _begin_gradient(grad, e_s, _f32(weight * t_sum / s_sum))
            if one_class:
                grad[target] -= _f32(weight)
            else:
                _add_lesson(grad, t, _f32(-weight), t, _ZERO)

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
                if not keep or logits[k, 2] == FLOAT32:
                    z_m = _row(logits[k, 0] + b * logits[k, 1], logits[k, 2], n_classes, z_m, -_INF)
                factor_m, factor_s = _f32(1 / tau_m) * _LOG2E, _f32(1 / tau_s) * _LOG2E
                if tau_s != last_tau:
                    s_sum, last_tau = _exponentials(z_s, tops[0], factor_s, e_s), tau_s
                m_sum = _exponentials(z_m, tops[k], factor_m, e_m)
                cross = _cross(e_m, z_m, tops[k], factor_m, z_s, tops[0], factor_s)
                kl = cross / m_sum * _LN2 - math.log(m_sum / s_sum)
                kl = 0.0 if kl < 0 else kl  # which rounding would make it
                weight = weights[m] * ranks[m] * tau_m
                if weight * tau_s != 0:
                    mentor_loss += weight * tau_s * kl
                if with_grad:
                    weight *= factor
                    _add_lesson(grad, e_s, _f32(weight / s_sum), e_m, _f32(weight / m_sum))
            if len(stats[b]):
                stats[b, m], stats[b, M + m] = active, M * shares[k]
                stats[b, 2 * M + m], stats[b, 3 * M + m] = tau_m, kl

        losses[b] = math.nan if nonfinite else loss + mentor_loss
        if len(stats[b]):
            stats[b, 4 * M] = math.exp(ell[0])
            stats[b, 4 * M + 1] = math.nan if nonfinite else -row_ell
            stats[b, 4 * M + 2] = math.nan if nonfinite else mentor_loss
        if with_grad:
            if nonfinite:
                grad[:] = math.nan
            if not in_place:
                _store(grad, grad_at, out[2], n_classes)


@compiled(error_model="numpy")
def totals(losses, stats, n_valid, mean, result):
    """The loss and the report of a batch, after each other, from the numbers of its rows."""
    rows_counted = max(n_valid, 1)
    sums = np.zeros(1 + stats.shape[1])
    M = (len(sums) - 4) // 4
    for b in range(len(losses)):
        sums[0] += losses[b]
        for i in range(stats.shape[1]):
            sums[1 + i] += stats[b, i]
    for i in range(len(sums)):
        divisor = rows_counted if mean or i > 0 else 1
        if 3 * M < i <= 4 * M:  # KL is a mean over the rows in which the mentor is active
            divisor = max(sums[i - 3 * M], 1.0)
        result[i] = sums[i] / divisor
