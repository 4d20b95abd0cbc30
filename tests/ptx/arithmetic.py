"""What an instruction computes, on arrays of bits: uint8 to uint64 registers, bool predicates.

`operation` turns an opcode into a function of its operands' bits. Results are exact (rounded once,
to nearest even) except those of ex2, lg2, rcp, rsqrt and div, for which PTX documents a largest
error: by default they are the nearest float32, and a `Perturbation` moves them about within that
error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.parse import WIDTH, UnknownInstructionError

Array = np.ndarray
Function = Callable[..., Array]
u16, u32, u64, i64 = np.uint16, np.uint32, np.uint64, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

BITS: dict[int, type[np.generic]] = {0: np.bool_, 1: np.uint8, 2: u16, 4: u32, 8: u64}
"""What a register of so many bytes is kept as."""
FLOATS = ("f16", "bf16", "f32", "f64", "f32x2")
_NUMPY = {"u": "u", "s": "i", "b": "u", "f": "f"}
TYPES = {
    name: np.dtype(f"{_NUMPY[name[0]]}{width}").type
    for name, width in WIDTH.items()
    if width and name[0] in _NUMPY and "x" not in name and name != "bf16"
}
"""NumPy's type of a PTX type; bfloat16 has none."""
_SMALLEST_NORMAL = np.finfo(f32).smallest_normal
_NAN = np.uint32(0x7FFFFFFF).view(f32)


@dataclass(frozen=True)
class Operation:
    """The bytes of the result and of each source (0: a predicate), and the function of their bits.

    With ``signed``, a wider destination register is filled with copies of the result's sign.
    """

    result: int
    sources: tuple[int, ...]
    function: Function
    signed: bool = False


class Perturbation:
    """Moves approximate results within their documented error; same operands, same result.

    Exact results (0, powers of two, infinities, NaN) stay, as on hardware: 2⁰ is 1, log₂ 1 is 0.
    """

    def __init__(self, seed: int) -> None:
        self.seed = u32(seed * 0x9E3779B1 & 0xFFFFFFFF)

    def __call__(self, result: Array, operands: tuple[Array, ...], steps: int) -> Array:
        """Result (float32) moved by −steps … steps units in the last place."""
        chosen = self._hash(operands) % u32(2 * steps + 1)
        bits = result.view(u32)
        moved = (bits + chosen - u32(steps)).view(f32)
        return np.where(self._inexact(bits), moved, result)

    def logarithm(self, result: Array, operand: Array) -> Array:
        """Result moved by 2⁻²² where ½ < operand < 2, elsewhere by 2⁻²² of itself, at the most."""
        part = (self._hash((operand,)).astype(f64) / 2.0**31 - 1) * 2.0**-22
        x = operand.view(f32)
        scale = np.where((x > 0.5) & (x < 2), 1, result.astype(f64))
        moved = (result + part * scale).astype(f32)
        return np.where(self._inexact(result.view(u32)), moved, result)

    def _hash(self, operands: tuple[Array, ...]) -> Array:
        value = self.seed
        for operand in operands:
            value = (operand.view(u32) ^ value) * u32(0x85EBCA6B)
            value = (value ^ (value >> u32(13))) * u32(0xC2B2AE35)
            value = value ^ (value >> u32(16))
        return np.asarray(value)

    @staticmethod
    def _inexact(bits: Array) -> Array:
        exponent = (bits >> u32(23)) & u32(255)
        return (exponent > 4) & (exponent < 253) & ((bits & u32(0x7FFFFF)) != 0)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c of float32 numbers, rounded once: the float64 sum is rounded to odd on the way."""
    product, c = a.astype(f64) * b.astype(f64), c.astype(f64)  # the product is exact
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(i64)
    inexact = ((error > 0) | (error < 0)) & ((bits & 1) == 0)
    if inexact.any():
        step = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(inexact, bits + step, bits).view(f64)
    return total.astype(f32)


def to_bfloat16(x: Array) -> Array:
    """float32 to the nearest bfloat16's bits; NaN becomes 0x7FFF, as on hardware."""
    bits = x.view(u32)
    rounded = ((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    return np.where(x != x, u16(0x7FFF), rounded)


def flushed(x: Array) -> Array:
    """With subnormal numbers (float32) made 0, keeping their sign."""
    tiny = np.abs(x) < _SMALLEST_NORMAL
    return np.where(tiny, np.copysign(f32(0), x), x) if tiny.any() else x


def _as_is(x: Array) -> Array:
    return x


def reader(kind: str) -> Function:
    """From bits to numbers; half precisions are read as float32, which holds them."""
    if kind == "bf16":
        return lambda bits: (bits.astype(u32) << u32(16)).view(f32)
    if kind == "f16":
        return lambda bits: bits.view(f16).astype(f32)
    if kind == "f32x2":
        return lambda bits: bits.view(f32).reshape(-1, 2)
    dtype = TYPES[kind]
    return lambda bits: bits.view(dtype)


def _one_nan(x: Array) -> Array:
    """With every NaN of float32 the one that hardware makes: a + b has the bits of b + a."""
    nan = x != x
    return np.where(nan, np.asarray(0x7FFFFFFF, u32).view(f32), x) if nan.any() else x


def _writer(kind: str) -> Function:
    """From numbers, float32 for half precisions, to bits."""
    if kind == "bf16":
        return to_bfloat16
    if kind == "f16":
        return lambda x: np.where(x != x, u16(0x7FFF), x.astype(f16).view(u16))
    if kind == "f32":
        return lambda x: _one_nan(x).view(u32)
    if kind == "f32x2":
        return lambda x: np.ascontiguousarray(_one_nan(x)).view(u64).reshape(-1)
    dtype, bits = TYPES[kind], BITS[WIDTH[kind]]
    return lambda x: x.astype(dtype, copy=False).view(bits)


def _one_nan(x: Array) -> Array:
    """float32 with every NaN the one that a GPU computes; NumPy's depends on operands' order."""
    return np.where(x != x, _NAN, x.astype(f32, copy=False))


def _take(opcode: tuple[str, ...], *allowed: str) -> set[str]:
    """The modifiers between an opcode's name and type, all of which must be known."""
    modifiers = set(opcode[1:-1])
    if unknown := modifiers - set(allowed):
        raise UnknownInstructionError(f"modifier {', '.join(sorted(unknown))}")
    return modifiers


# --- comparisons

_COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(name: str, kind: str, flush: bool) -> Function:
    """setp's comparison of two arrays of bits; unordered ones are true where a number is NaN."""
    if kind not in FLOATS:
        dtype = TYPES[kind]
        compare = _COMPARE[_UNSIGNED.get(name, name)]
        return lambda a, b: compare(a.view(dtype), b.view(dtype))
    read = reader(kind)
    if flush:
        unflushed = read

        def read(bits: Array) -> Array:
            return flushed(unflushed(bits))

    def nan(a: Array, b: Array) -> Array:
        return (a != a) | (b != b)

    if name in ("nan", "num"):
        return lambda a, b: nan(read(a), read(b)) == (name == "nan")
    compare, unordered = _COMPARE[name.removesuffix("u")], name.endswith("u")

    def compared(a: Array, b: Array) -> Array:
        a, b = read(a), read(b)
        return compare(a, b) | nan(a, b) if unordered else compare(a, b) & ~nan(a, b)

    return compared


# --- integers and logic


def _shift(opcode: tuple[str, ...]) -> Operation:
    """By as much as asked for: beyond the width all bits leave, or are copies of the sign."""
    _take(opcode)
    width, left = WIDTH[opcode[-1]], opcode[0] == "shl"
    dtype = np.dtype(f"{'i' if opcode[-1][0] == 's' else 'u'}{width}").type
    most = 8 * width - 1

    def shift(a: Array, by: Array) -> Array:
        inside = np.minimum(by, u32(most)).astype(dtype)
        shifted = (a.view(dtype) << inside if left else a.view(dtype) >> inside).view(a.dtype)
        if opcode[-1][0] == "s":
            return shifted
        return np.where(by > most, a.dtype.type(0), shifted)

    return Operation(width, (width, 4), shift)


def _high_product(a: Array, b: Array, kind: str) -> Array:
    """The upper half of the product."""
    width = WIDTH[kind]
    if width < 8:
        product = _wide_product(a, b, kind)
        return (product >> product.dtype.type(8 * width)).astype(a.dtype)
    low, half = u64(0xFFFFFFFF), u64(32)
    (al, ah), (bl, bh) = (a & low, a >> half), (b & low, b >> half)
    middle = (al * bl >> half) + (ah * bl & low) + (al * bh & low)
    high = ah * bh + (ah * bl >> half) + (al * bh >> half) + (middle >> half)
    if kind[0] == "s":
        zero = u64(0)
        high = high - np.where(a.view(i64) < 0, b, zero) - np.where(b.view(i64) < 0, a, zero)
    return high


def _wide_product(a: Array, b: Array, kind: str) -> Array:
    """The product in twice the width."""
    dtype = TYPES[kind]
    wide = np.dtype(f"{np.dtype(dtype).kind}{2 * WIDTH[kind]}").type
    return (a.view(dtype).astype(wide) * b.view(dtype).astype(wide)).view(BITS[2 * WIDTH[kind]])


def _product(opcode: tuple[str, ...]) -> Operation:
    """mul and mad: the lower half, the upper half, or all of the product."""
    kind = opcode[-1]
    (part,) = _take(opcode, "lo", "hi", "wide")
    width = WIDTH[kind]
    if part == "wide":
        width, multiply = 2 * width, lambda a, b: _wide_product(a, b, kind)
    elif part == "hi":
        multiply = lambda a, b: _high_product(a, b, kind)  # noqa: E731
    else:
        multiply = np.multiply
    sources = (WIDTH[kind], WIDTH[kind])
    if opcode[0] == "mul":
        return Operation(width, sources, multiply)
    return Operation(width, (*sources, width), lambda a, b, c: multiply(a, b) + c)


def _bits(opcode: tuple[str, ...]) -> Operation:
    """and, or, xor and not, of registers and of predicates."""
    _take(opcode)
    width = WIDTH[opcode[-1]]
    if opcode[0] == "not":
        return Operation(width, (width,), np.invert)
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return Operation(width, (width, width), functions[opcode[0]])


def _select(opcode: tuple[str, ...]) -> Operation:
    _take(opcode)
    width = WIDTH[opcode[-1]]
    return Operation(width, (width, width, 0), lambda a, b, p: np.where(p, a, b))


def _move(opcode: tuple[str, ...]) -> Operation:
    """mov, and cvta, as addresses of all spaces are the same numbers here."""
    _take(opcode, *("to", "global", "shared") if opcode[0] == "cvta" else ())
    width = WIDTH[opcode[-1]]
    return Operation(width, (width,), _as_is)


def _permute(opcode: tuple[str, ...]) -> Operation:
    """prmt: each nibble of the selector names one of eight bytes, or its sign."""
    if opcode != ("prmt", "b32"):
        raise UnknownInstructionError("permutation mode")

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(u64) | (b.astype(u64) << u64(32))
        result = u32(0)
        for k in range(4):
            nibble = ((selector >> u32(4 * k)) & u32(15)).astype(u64)
            byte = (both >> ((nibble & u64(7)) * u64(8))) & u64(255)
            sign = np.where(byte & u64(128), u64(255), u64(0))
            byte = np.where(nibble & u64(8), sign, byte)
            result = result | (byte << u64(8 * k)).astype(u32)
        return np.asarray(result)

    return Operation(4, (4, 4, 4), permute)


def _extract(opcode: tuple[str, ...]) -> Operation:
    """bfe: so many bits from a position on; signed ones repeat the field's highest bit."""
    _take(opcode)
    kind = opcode[-1]
    if kind not in ("u32", "s32"):
        raise UnknownInstructionError("type")

    def extract(a: Array, position: Array, length: Array) -> Array:
        position, length = (x & u32(255) for x in (position, length))
        # Beyond bit 31 there are zeros, or copies of the sign.
        wide = a.view(TYPES[kind]).astype(i64)
        field = wide >> np.minimum(position, u32(63)).astype(i64)
        n = np.minimum(length, u32(32)).astype(i64)
        kept = field & ((i64(1) << n) - i64(1))
        if kind == "s32":
            top = np.maximum(n - 1, 0)
            kept = np.where((n > 0) & ((kept >> top) & 1 == 1), kept - (i64(1) << n), kept)
        return kept.astype(u32)

    return Operation(4, (4, 4, 4), extract)


def _funnel(opcode: tuple[str, ...]) -> Operation:
    """shf: the upper half of two registers shifted to the left, or the lower one to the right."""
    direction, mode, kind = opcode[1:]
    if direction not in ("l", "r") or mode not in ("wrap", "clamp") or kind != "b32":
        raise UnknownInstructionError("form")

    def shift(low: Array, high: Array, by: Array) -> Array:
        n = (by & u32(31) if mode == "wrap" else np.minimum(by, u32(32))).astype(u64)
        both = high.astype(u64) << u64(32) | low
        return ((both << n) >> u64(32) if direction == "l" else both >> n).astype(u32)

    return Operation(4, (4, 4, 4), shift)


def _integer(opcode: tuple[str, ...]) -> Operation:
    """add, sub, min, max, neg, abs, div, rem; min and max with relu are at least 0."""
    name, kind = opcode[0], opcode[-1]
    relu = _take(opcode, *(("relu",) if name in ("min", "max") and kind == "s32" else ()))
    dtype, bits, width = TYPES[kind], BITS[WIDTH[kind]], WIDTH[kind]
    if name in ("neg", "abs"):
        one = np.negative if name == "neg" else np.abs
        return Operation(width, (width,), lambda a: one(a.view(dtype)).view(bits))
    functions = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
    # NumPy's signed division rounds down; PTX's to 0, as C's and np.fmod do.
    functions |= {"div": lambda a, b: (a - np.fmod(a, b)) // b, "rem": np.fmod}
    two = functions[name]

    def of_two(a: Array, b: Array) -> Array:
        result = two(a.view(dtype), b.view(dtype))
        return (np.maximum(result, dtype(0)) if relu else result).view(bits)

    return Operation(width, (width, width), of_two)


# --- floating point


def extremum_of(largest: bool, nan: bool) -> Function:
    """Largest or smallest, −0 < 0; of NaN and a number the number, or with ``nan`` NaN."""
    choose = [[np.fmin, np.minimum], [np.fmax, np.maximum]][largest][nan]

    def extremum(a: Array, b: Array, *more: Array) -> Array:
        chosen = choose(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            sign = np.signbit(a) & np.signbit(b) if largest else np.signbit(a) | np.signbit(b)
            chosen = np.where(zeros, np.where(sign, f32(-0.0), f32(0)), chosen)
        return extremum(chosen, *more) if more else chosen

    return extremum


def _float(opcode: tuple[str, ...], n_sources: int) -> Operation:
    """add, sub, mul, fma, min, max, neg, abs in float32, and all but fma in half precision.

    Sums and products of half-precision numbers are rounded to float32 first, which changes nothing:
    its 24 bits are at least twice as many as theirs and two more.
    """
    name, kind = opcode[0], opcode[-1]
    width, bits = WIDTH[kind], BITS[WIDTH[kind]]
    if name in ("neg", "abs"):
        _take(opcode)
        sign = bits(1 << (8 * width - 1))
        return Operation(width, (width,), lambda a: a ^ sign if name == "neg" else a & ~sign)
    modifiers = _take(opcode, "ftz", *(("NaN",) if name in ("min", "max") else ("rn",)))
    functions: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    if name in ("min", "max"):
        functions[name] = extremum_of(name == "max", "NaN" in modifiers)
    elif name == "fma" and kind in ("f32", "f32x2"):
        functions[name] = fma
    if name not in functions or kind == "f64":
        raise UnknownInstructionError("type")
    if n_sources not in {"fma": (3,), "min": (2, 3), "max": (2, 3)}.get(name, (2,)):
        raise UnknownInstructionError(f"{n_sources} source operands")
    function, read, write = functions[name], reader(kind), _writer(kind)
    flush = flushed if "ftz" in modifiers else _as_is

    def compute(*sources: Array) -> Array:
        return write(flush(function(*[flush(read(each)) for each in sources])))

    return Operation(width, (width,) * n_sources, compute)


def _approximate(opcode: tuple[str, ...], perturb: Perturbation | None) -> Operation:
    """ex2, lg2, rcp, rsqrt, div; the error that PTX documents is at most 2, –, 1, 2, 2 units."""
    name, kind = opcode[0], opcode[-1]
    if kind != "f32":
        raise UnknownInstructionError("type")
    modifiers = _take(opcode, "ftz", "approx", *(("full", "rn") if name == "div" else ()))
    flush = flushed if "ftz" in modifiers else _as_is
    functions: dict[str, Function] = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": np.reciprocal,
        "rsqrt": lambda x: 1.0 / np.sqrt(x),
        "div": np.divide,
    }
    function = functions[name]
    steps = {"ex2": 2, "rcp": 1, "rsqrt": 2, "div": 2}

    def compute(*operands: Array) -> Array:
        exact = function(*(flush(each.view(f32)).astype(f64) for each in operands))
        result = flush(exact.astype(f32))
        if perturb and "rn" not in modifiers:
            if name == "lg2":
                result = perturb.logarithm(result, operands[0])
            else:
                result = perturb(result, operands, steps[name])
        return _one_nan(result).view(u32)

    return Operation(4, (4, 4) if name == "div" else (4,), compute)


def _mixed(opcode: tuple[str, ...]) -> Operation:
    """add, sub and fma of half-precision operands and, the last one, float32, in float32."""
    name, kind = opcode[0], opcode[-1]
    if set(opcode[1:-2]) - {"rn"}:
        raise UnknownInstructionError("modifier")
    functions: dict[str, Function] = {"add": np.add, "sub": np.subtract, "fma": fma}
    function, read = functions[name], reader(kind)
    narrow = (2, 2) if name == "fma" else (2,)

    def compute(*sources: Array) -> Array:
        *halves, last = sources
        exact = [read(each).astype(f32) for each in halves]
        return _writer("f32")(function(*exact, last.view(f32)))

    return Operation(4, (*narrow, 4), compute)


def _copy_sign(opcode: tuple[str, ...]) -> Operation:
    """The second operand's magnitude with the first one's sign."""
    if opcode != ("copysign", "f32"):
        raise UnknownInstructionError("type")
    sign = u32(1 << 31)
    return Operation(4, (4, 4), lambda a, b: (a & sign) | (b & ~sign))


def _count_ones(opcode: tuple[str, ...]) -> Operation:
    _take(opcode)
    width = WIDTH[opcode[-1]]
    return Operation(4, (width,), lambda a: np.bitwise_count(a).astype(u32))


# --- conversions

_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(opcode: tuple[str, ...]) -> Operation:
    """cvt among integers, among floating-point types, and between them."""
    to, of = opcode[-2:]
    modifiers = set(opcode[1:-2])
    if unknown := modifiers - {"rn", "ftz", *_WHOLE}:
        raise UnknownInstructionError(f"modifier {', '.join(sorted(unknown))}")
    if to in ("bf16x2", "f16x2"):
        if modifiers != {"rn"} or of != "f32":
            raise UnknownInstructionError("conversion to two numbers")
        narrow = _writer(to.removesuffix("x2"))
        return Operation(
            *(4, (4, 4)),
            lambda high, low: (
                (narrow(high.view(f32)).astype(u32) << u32(16)) | narrow(low.view(f32))
            ),
        )
    width, sources, read = WIDTH[to], (WIDTH[of],), reader(of)
    if of not in FLOATS and to not in FLOATS:
        dtype = TYPES[to]
        function = lambda a: read(a).astype(dtype).view(BITS[width])  # noqa: E731
        return Operation(width, sources, function, signed=to[0] == "s")
    flush = flushed if "ftz" in modifiers else _as_is
    read = (lambda bits: flush(bits.view(f32))) if of == "f32" else read
    whole = next((_WHOLE[each] for each in modifiers & {*_WHOLE}), _as_is)
    if to in FLOATS:
        if WIDTH[to] == 2 and of not in ("f16", "bf16", "f32"):
            raise UnknownInstructionError("conversion, which would be rounded twice")
        write = _writer(to)
        if to == "f32":
            write = lambda x: flush(x.astype(f32)).view(u32)  # noqa: E731
        return Operation(width, sources, lambda a: write(whole(read(a))))
    if whole is _as_is:
        raise UnknownInstructionError("conversion without a rounding mode")
    dtype = TYPES[to]
    limits = np.iinfo(dtype)

    def integral(a: Array) -> Array:
        x = whole(read(a).astype(f64))
        x = np.where(x != x, 0, x)
        high, low = x >= 2.0**limits.bits / (2 if limits.min else 1), x <= limits.min
        inside = np.where(high | low, 0, x).astype(dtype)
        limited = np.where(high, dtype(limits.max), np.where(low, dtype(limits.min), inside))
        return limited.view(BITS[width])

    return Operation(width, sources, integral, signed=to[0] == "s")


def operation(
    opcode: tuple[str, ...], n_sources: int, perturb: Perturbation | None = None
) -> Operation:
    """The arithmetic of an opcode. Raises UnknownInstructionError if it has none here."""
    name, kind = opcode[0], opcode[-1]
    if kind not in WIDTH:
        raise UnknownInstructionError("type")
    if name in ("ex2", "lg2", "rcp", "rsqrt") or (name == "div" and kind in FLOATS):
        return _approximate(opcode, perturb)
    if name in _GROUPS:
        return _GROUPS[name](opcode)
    if name in ("add", "sub", "fma") and kind in ("f16", "bf16") and opcode[-2] == "f32":
        return _mixed(opcode)
    if name in ("add", "sub", "mul", "fma", "min", "max", "neg", "abs") and kind in FLOATS:
        return _float(opcode, n_sources)
    if kind not in TYPES or kind in FLOATS:
        raise UnknownInstructionError("opcode")
    if name in ("mul", "mad"):
        return _product(opcode)
    if name in ("add", "sub", "min", "max", "neg", "abs", "div", "rem"):
        return _integer(opcode)
    raise UnknownInstructionError("opcode")


_GROUPS: dict[str, Callable[[tuple[str, ...]], Operation]] = {
    "cvt": _convert,
    "mov": _move,
    "cvta": _move,
    "selp": _select,
    "and": _bits,
    "or": _bits,
    "xor": _bits,
    "not": _bits,
    "shl": _shift,
    "shr": _shift,
    "prmt": _permute,
    "bfe": _extract,
    "shf": _funnel,
    "popc": _count_ones,
    "copysign": _copy_sign,
}
