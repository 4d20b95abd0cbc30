"""Loops over the classes of a row, compiled by numba into vector instructions.

They are over contiguous float32 and have no branch. Rows of another dtype are converted one at a
time into scratch.

Sums may be reordered, which vector instructions need (``reassoc``): the order is that of the
machine code, the same for every row of a length, whoever computes it. No other freedom is given
with NaN, infinities or subtractions.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

FLOAT32, FLOAT16, BFLOAT16 = range(3)
"""Kinds of logits."""

_BLOCK = 2048  # classes that are summed in float32; the blocks' sums are in float64

_f32, _i32, _u32 = np.float32, np.int32, np.uint32
_ZERO, _ONE = _f32(0), _f32(1)

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

exact = njit(forceinline=True, error_model="numpy")
_fused = njit(forceinline=True, error_model="numpy", fastmath={"contract"})
_summing = njit(forceinline=True, error_model="numpy", fastmath={"reassoc", "nsz"})


@intrinsic
def pointer(context, address):
    def build(context, builder, signature, arguments):
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


@exact
def _ordered(bits):
    """A float32's bits, ordered as an integer as the number is; its own inverse."""
    return _i32(bits ^ _i32(_i32(bits >> _i32(31)) & _i32(0x7FFFFFFF)))


@exact
def largest(z):
    """The largest of a row. A NaN counts as larger or smaller than any number, by its sign."""
    bits = z.view(np.int32)
    most = _i32(-(2**31))
    for i in range(len(bits)):
        candidate = _ordered(bits[i])
        most = _i32(candidate if candidate > most else most)
    return _i32(_ordered(most)).view(np.float32)


@_summing
def exponentials(z, top, factor, out):
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


@exact
def _expected_term(t, z, top):
    return np.float64(t) * np.float64(z - top) if t > _ZERO else 0.0


@_summing
def expected(t, z, top):
    """Σ t (z − top), in float64, as all else depends on it, and Σ t; 0 · −inf is 0."""
    total = t_total = 0.0
    for i in range(len(z)):
        total += _expected_term(t[i], z[i], top)
        t_total += np.float64(t[i])
    return total, t_total


@exact
def _cross_term(e_m, z_m, top_m, factor_m, z_s, top_s, factor_s):
    # Not fused: of equal logits the difference must be 0.
    difference = (z_m - top_m) * factor_m - (z_s - top_s) * factor_s
    return e_m * difference if e_m > _ZERO else _ZERO


@exact
def _difference(e_m, e_s):
    return e_m - e_s


@_summing
def cross(e_m, z_m, top_m, factor_m, e_s, z_s, top_s, factor_s):
    """Σ e_m (v_m − v_s), v = z · factor, 0 where e_m is 0, whatever the student says; Σ e_m − e_s.

    The second is as precise as it is small, unlike a difference of two sums.
    """
    total = difference = 0.0
    for start in range(0, len(e_m), _BLOCK):
        stop = start + _BLOCK
        mentor_e, mentor = e_m[start:stop], z_m[start:stop]
        student_e, student = e_s[start:stop], z_s[start:stop]
        part = less = _ZERO
        for i in range(len(mentor)):
            e = mentor_e[i]
            part += _cross_term(e, mentor[i], top_m, factor_m, student[i], top_s, factor_s)
            less += _difference(e, student_e[i])
        total += part
        difference += less
    return total, difference


@_fused
def begin_gradient(grad, e, weight):
    for i in range(len(grad)):
        grad[i] = e[i] * weight


@_fused
def add_difference(grad, e_s, weight_s, e_m, weight_m):
    for i in range(len(grad)):
        grad[i] += weight_s * e_s[i] - weight_m * e_m[i]


@exact
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


@exact
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


@exact
def _to_bfloat16(value):
    """The nearest bfloat16's bits, of ties the even one; of a NaN, as arithmetic makes it, too."""
    bits = _f32(value).view(np.uint32)
    odd = _u32(_u32(bits >> _u32(16)) & _u32(1))
    return np.uint16(_u32(_u32(bits + _u32(_u32(0x7FFF) + odd)) >> _u32(16)))


@exact
def row(address, kind, n_classes, scratch):
    """A row as float32: where it lies, if that is one, or else in ``scratch``."""
    if kind == FLOAT32:
        return carray(pointer(address), n_classes, np.float32)
    bits = carray(pointer(address), n_classes, np.uint16)
    if kind == FLOAT16:
        for i in range(n_classes):
            scratch[i] = _float16(_u32(bits[i]))
    else:
        into = scratch.view(np.uint32)
        for i in range(n_classes):
            into[i] = _u32(_u32(bits[i]) << _u32(16))
    return scratch


@exact
def store(grad, factor, address, kind, n_classes):
    """Write a row of the gradient times a factor."""
    if kind == FLOAT32:
        out = carray(pointer(address), n_classes, np.float32)
        for i in range(n_classes):
            out[i] = grad[i] * factor
    else:
        bits = carray(pointer(address), n_classes, np.uint16)
        if kind == FLOAT16:
            for i in range(n_classes):
                bits[i] = _to_float16(grad[i] * factor)
        else:
            for i in range(n_classes):
                bits[i] = _to_bfloat16(grad[i] * factor)
