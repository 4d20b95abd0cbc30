"""Device functions that the kernels share: arithmetic on tiles and lanes.

Rows are [R], networks in lanes [R, K]: the student in lane 0, mentor m (from 1) in lane m.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # log 2 to 15 bits
LN2_LOW = tl.constexpr(1.4286068202862268e-6)
MIN_TAU = tl.constexpr(1e-20)  # nothing is softened any more, and logits over it are finite
FLOOR = tl.constexpr(-3.4028234663852886e38)  # log-confidence of a probability of exactly 0


@triton.jit
def lane_of(values, lane, k):
    """Lane k of lanes [R, K], as [R, 1]."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.sum(tl.where(lane == k, bits, 0), 1)[:, None].to(tl.float32, bitcast=True)


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
    """The nearest integer to x ≥ 0, ties to even, as torch.round does."""
    low = tl.floor(x)
    above = x - low
    odd = low - 2.0 * tl.floor(low * 0.5)
    return low + tl.where((above > 0.5) | ((above == 0.5) & (odd == 1.0)), 1.0, 0.0)


@triton.jit
def one_minus_exp(d):
    """1 − exp(−d) for d ≥ 0; by its series if the subtraction would cancel."""
    series = 1.0 - d * (1.0 / 4) * (1.0 - d * (1.0 / 5))
    series = d * (1.0 - d * (1.0 / 2) * (1.0 - d * (1.0 / 3) * series))
    return tl.where(d < 0.125, series, 1.0 - tl.exp2(-d * LOG2E))


@triton.jit
def reciprocal(x):
    """1 / x of a positive normal number; NaN is kept. 4 instructions, where a division has 9.

    The square of an approximate 1 / √x, and a step of Newton's method, which leaves rounding.
    """
    root = tl.rsqrt(x)
    guess = root * root
    return guess * (2.0 - x * guess)


@triton.jit
def log_in_parts(x):
    """n and log(1 + f) of a normal number x = 2^n · (1 + f), −1/3 ≤ f < 1/3; NaN is kept.

    log(1 + f) is f · P(f), where P interpolates log(1 + f) / f at ten Chebyshev points, so the
    relative precision holds near 1. 20 instructions; tl.log2 has 32.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -8388608
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = -0.12726289 * f + 0.1407889
    p = p * f - 0.1222136
    p = p * f + 0.13982579
    p = p * f - 0.16677974
    p = p * f + 0.20012298
    p = p * f - 0.24999842
    p = p * f + 0.3333316
    p = p * f - 0.5
    p = p * f + 1.0
    return exponent.to(tl.float32) * 2.0**-23, f * p + (x - x)


@triton.jit
def log_confidence(picked, t_sum, e_sum):
    """ℓ from Σ_c t_c (z − max z), Σ_c t_c and Σ_c exp(z − max z); −inf is kept.

    n · LN2_HIGH is exact, so that ℓ has little more error than its final rounding.
    """
    n, rest = log_in_parts(e_sum)
    return (picked - t_sum * (n * LN2_HIGH)) - t_sum * (n * LN2_LOW + rest)


@triton.jit
def exponents(d, scale):
    """log2 of the softmax numerators, d · scale, for d = z − max z and scale = log2(e) / τ.

    The subtraction comes first, so that the largest value is exactly 0: confidences that round to
    1 in float32 are equal, and so are the sums of two distributions that round to one-hot.
    """
    return d * scale


@triton.jit
def cross_terms(e_m, d_m, d_s, scale_m, scale_s, SAME_TAU: tl.constexpr):
    """e_m · (v_m − v_s) / scale_m, and 0 if e_m is 0, for any student: 0 · log 0 is 0.

    With a common temperature it is e_m · (d_m − d_s), which avoids a rounding error that high
    temperatures would multiply.
    """
    if SAME_TAU:
        difference = d_m - d_s
    else:
        difference = d_m - d_s * (scale_s / scale_m)
    return e_m * tl.where(e_m > 0.0, difference, 0.0)


@triton.jit
def divergence(cross, tau_m, sum_m, sum_s):
    """KL_m in nats from the sums of `cross_terms`, e_m and e_s."""
    n, rest = log_in_parts(sum_m / sum_s)
    kl = cross / (sum_m * tau_m) - (n * LN2_HIGH + (n * LN2_LOW + rest))
    return tl.where(kl < 0.0, 0.0, kl)  # which rounding would make it
