"""Each group of opcodes against Python's integers and fractions, NumPy and PyTorch."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx.arithmetic import BITS, FLOATS, TYPES, Perturbation, comparison, operation
from tests.ptx.parse import WIDTH, UnknownInstructionError

pytestmark = pytest.mark.ptx

N = 400
SPECIAL = {
    "f32": [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80000001, 0x7F7FFFFF],
    "f16": [0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 1, 0x8001, 0x7BFF],
    "bf16": [0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 1, 0x8001, 0x7F7F],
}


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def draw(width, seed, kind="u32"):
    """Random bits, small and large numbers and each pair of the special ones among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**64, N, dtype=np.uint64, endpoint=False)
    bits >>= rng.integers(0, 64, N, dtype=np.uint64) * (kind not in FLOATS)
    values = bits.astype(BITS[width])
    if kind == "f32":  # numbers of one size, so that sums round
        values[: N // 2] = rng.standard_normal(N // 2).astype(np.float32).view(np.uint32)
    if special := SPECIAL.get(kind):
        n = len(special)
        values[-n * n :] = np.repeat(special, n) if seed % 2 else np.tile(special, n)
    return values


def execute(text, *operands, perturb=None):
    opcode = tuple(text.split("."))
    computed = operation(opcode, len(operands), perturb)
    assert tuple(x.dtype.itemsize if x.dtype != bool else 0 for x in operands) == computed.sources
    result = computed.function(*operands)
    assert result.dtype == BITS[computed.result]
    return result


def as_int(values, kind):
    return values.view(TYPES[kind]).tolist()


def same_bits(got, expected):
    """Equal, where a NaN is as good as another."""
    dtype = {2: np.float16, 4: np.float32}[got.dtype.itemsize]
    np.testing.assert_array_equal(got.view(dtype), expected.view(dtype))
    known = expected.view(dtype) == expected.view(dtype)
    np.testing.assert_array_equal(got[known], expected[known])  # 0 and −0, too


INTEGERS = {
    "add": lambda a, b, _: a + b,
    "sub": lambda a, b, _: a - b,
    "min": lambda a, b, _: min(a, b),
    "max": lambda a, b, _: max(a, b),
    "min.relu": lambda a, b, _: max(min(a, b), 0),
    "max.relu": lambda a, b, _: max(a, b, 0),
    "mul.lo": lambda a, b, _: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "mul.wide": lambda a, b, _: a * b,
    "neg": lambda a, _: -a,
    "abs": lambda a, _: abs(a),
    "mad.lo": lambda a, b, c, _: a * b + c,
    "mad.wide": lambda a, b, c, _: a * b + c,
}
KINDS = {name: ["u16", "s16", "u32", "s32", "u64", "s64"] for name in INTEGERS}
KINDS |= {"mul.wide": ["u16", "s16", "u32", "s32"], "neg": ["s32", "s64"], "abs": ["s32", "s64"]}
KINDS |= {"mad.lo": ["s32", "u64"], "mad.wide": ["s32"], "min.relu": ["s32"], "max.relu": ["s32"]}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in KINDS for kind in KINDS[name]])
def test_integers(name, kind):
    function, width = INTEGERS[name], WIDTH[kind]
    operands = [draw(width, seed) for seed in (1, 2)[: function.__code__.co_argcount - 1]]
    columns = [as_int(operand, kind) for operand in operands]
    if name.startswith("mad"):  # what is added is as wide as the result
        operands.append(draw(2 * width if name == "mad.wide" else width, 3))
        columns.append(operands[-1].tolist())
    got = execute(f"{name}.{kind}", *operands)
    expected = [function(*each, 8 * width) for each in zip(*columns, strict=True)]
    assert got.tolist() == [value % 256**got.dtype.itemsize for value in expected]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_division(kind):
    """Towards 0; the remainder has the dividend's sign."""
    a, b = draw(WIDTH[kind], 1), draw(WIDTH[kind], 2) | BITS[WIDTH[kind]](1)
    pairs = [*zip(as_int(a, kind), as_int(b, kind), strict=True)]
    signs = [-1 if (x < 0) != (y < 0) else 1 for x, y in pairs]
    quotients = [s * (abs(x) // abs(y)) for s, (x, y) in zip(signs, pairs, strict=True)]
    assert as_int(execute(f"div.{kind}", a, b), kind) == quotients
    assert as_int(execute(f"rem.{kind}", a, b), kind) == [
        x - q * y for q, (x, y) in zip(quotients, pairs, strict=True)
    ]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "pred"])
def test_logic(kind):
    a, b = (draw(WIDTH[kind], seed) for seed in (1, 2))
    pairs = [*zip(a.tolist(), b.tolist(), strict=True)]
    assert execute(f"and.{kind}", a, b).tolist() == [x & y for x, y in pairs]
    assert execute(f"or.{kind}", a, b).tolist() == [x | y for x, y in pairs]
    assert execute(f"xor.{kind}", a, b).tolist() == [x ^ y for x, y in pairs]
    ones = 256 ** WIDTH[kind] - 1 if kind != "pred" else 1
    assert execute(f"not.{kind}", a).tolist() == [x ^ ones for x in a.tolist()]


@pytest.mark.parametrize("kind", ["b32", "u32", "s32", "b64", "u64", "s64"])
def test_shifts(kind):
    a, by = draw(WIDTH[kind], 1), np.arange(N, dtype=np.uint32) % 70
    by[-1] = 2**31
    bits = 8 * WIDTH[kind]
    pairs = zip(as_int(a, kind), by.tolist(), strict=True)
    assert execute(f"shr.{kind}", a, by).tolist() == [(x >> min(n, 64)) % 2**bits for x, n in pairs]
    if kind[0] == "b":
        pairs = zip(a.tolist(), by.tolist(), strict=True)
        expected = [(x << min(n, 64)) % 2**bits for x, n in pairs]
        assert execute(f"shl.{kind}", a, by).tolist() == expected


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_shifts_of_two_registers(mode):
    low, high, by = draw(4, 1), draw(4, 2), draw(4, 3) % np.uint32(40)
    numbers = [*zip(low.tolist(), high.tolist(), by.tolist(), strict=True)]
    steps = [n % 32 if mode == "wrap" else min(n, 32) for *_, n in numbers]
    both = [a | b << 32 for a, b, _ in numbers]
    left = [x << n >> 32 & 2**32 - 1 for x, n in zip(both, steps, strict=True)]
    right = [x >> n & 2**32 - 1 for x, n in zip(both, steps, strict=True)]
    assert execute(f"shf.l.{mode}.b32", low, high, by).tolist() == left
    assert execute(f"shf.r.{mode}.b32", low, high, by).tolist() == right


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_extracted_bits(kind):
    a, at, n = draw(4, 1), draw(4, 2) % 40, draw(4, 3) % 40

    def extracted(a, at, n):
        """As the manual has it, bit by bit."""
        n &= 255
        top = min(at + n - 1, 31)
        sign = (a >> top & 1) if kind == "s32" and n else 0
        bits = [(a >> at + i & 1) if i < n and at + i <= 31 else sign for i in range(32)]
        return sum(bit << i for i, bit in enumerate(bits))

    at, n = at.astype(np.uint32), n.astype(np.uint32)
    expected = [*map(extracted, a.tolist(), at.tolist(), n.tolist())]
    assert execute(f"bfe.{kind}", a, at, n).tolist() == expected


def test_permuted_bytes():
    a, b, selector = (draw(4, seed) for seed in (1, 2, 3))

    def permuted(a, b, selector):
        data = (a | b << 32).to_bytes(8, "little")
        nibbles = [selector >> 4 * k & 15 for k in range(4)]
        chosen = [data[n & 7] if n < 8 else 255 * (data[n & 7] >> 7) for n in nibbles]
        return int.from_bytes(chosen, "little")

    expected = [*map(permuted, a.tolist(), b.tolist(), selector.tolist())]
    assert execute("prmt.b32", a, b, selector).tolist() == expected


def test_selection_and_moves():
    a, b, p = draw(4, 1), draw(4, 2), draw(4, 3) % 2 == 0
    np.testing.assert_array_equal(execute("selp.b32", a, b, p), np.where(p, a, b))
    np.testing.assert_array_equal(execute("mov.b32", a), a)


# --- comparisons

COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_compared_integers(name, kind):
    a, b = draw(WIDTH[kind], 1), draw(WIDTH[kind], 2)
    b[::3] = a[::3]
    expected = [*map(COMPARISONS[name], as_int(a, kind), as_int(b, kind))]
    assert comparison(name, kind, flush=False)(a, b).tolist() == expected


def numbers(bits, kind):
    """The numbers, as Python's floats."""
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    signed = torch.from_numpy(bits.view(f"i{bits.itemsize}").copy())
    return signed.view(dtype).double().tolist()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_compared_numbers(name, kind):
    """Ordered comparisons are false where a number is NaN, unordered ones true."""
    a, b = draw(WIDTH[kind], 1, kind), draw(WIDTH[kind], 2, kind)
    b[:30] = a[:30]
    pairs = [*zip(numbers(a, kind), numbers(b, kind), strict=True)]
    nan = [x != x or y != y for x, y in pairs]
    assert any(nan)
    true = [COMPARISONS[name](x, y) for x, y in pairs]
    ordered = [c and not n for c, n in zip(true, nan, strict=True)]
    unordered = [c or n for c, n in zip(true, nan, strict=True)]
    assert comparison(name, kind, flush=False)(a, b).tolist() == ordered
    assert comparison(f"{name}u", kind, flush=False)(a, b).tolist() == unordered
    assert comparison("nan", kind, flush=False)(a, b).tolist() == nan
    assert comparison("num", kind, flush=False)(a, b).tolist() == [not n for n in nan]


def test_subnormal_numbers_compare_as_zero_where_flushed():
    a, b = np.array([1, 0x80000001], np.uint32), np.array([0, 0], np.uint32)
    assert comparison("eq", "f32", flush=True)(a, b).all()
    assert not comparison("eq", "f32", flush=False)(a, b).any()


# --- floating point


def rounded(exact):
    """The float32 nearest to a fraction, the even one of two."""
    near = np.float32(float(exact))
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, -np.inf)]
    candidates = [np.float32(c) for c in candidates if np.isfinite(c)]
    return min(
        candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1)
    )


FLOAT32 = {
    "add.f32": lambda a, b: a + b,
    "add.rn.f32": lambda a, b: a + b,
    "sub.f32": lambda a, b: a - b,
    "mul.f32": lambda a, b: a * b,
    "fma.rn.f32": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("name", FLOAT32)
def test_float32(name):
    """Each result is the exact one, rounded once."""
    n = 3 if "fma" in name else 2
    operands = [draw(4, seed, "f32")[: N // 2] for seed in range(n)]
    if n == 3:  # sums that cancel, and products that are far below them
        a, b, c = (x.view(np.float32) for x in operands)
        c[::2] = -(a[::2] * b[::2])
        c[1::8] *= np.float32(2.0**-40)
        a[3::8] *= np.float32(2.0**-30)
    got = execute(name, *operands).view(np.float32)
    fractions = [[Fraction(float(v)) for v in x.view(np.float32)] for x in operands]
    expected = [rounded(FLOAT32[name](*each)) for each in zip(*fractions, strict=True)]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_special_float32(name):
    a, b = draw(4, 1, "f32"), draw(4, 2, "f32")
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    same_bits(
        execute(f"{name}.f32", a, b),
        function(a.view(np.float32), b.view(np.float32)).view(np.uint32),
    )


def test_every_nan_is_the_one_that_hardware_makes():
    inf, nans = np.float32(np.inf), np.array([0xFFC00000, 0x7FC00001], np.uint32)
    infinite, one = np.full(2, inf).view(np.uint32), np.ones(2, np.float32).view(np.uint32)
    for opcode, operands in (
        *((f"{name}.f32", (nans, one)) for name in ("add", "sub", "mul", "max.NaN", "min.NaN")),
        ("add.f32", (one, nans)),
        ("sub.f32", (infinite, infinite)),
        ("fma.rn.f32", (one, one, nans)),
        ("ex2.approx.ftz.f32", (nans,)),
        ("div.full.f32", (one, nans)),
    ):
        assert execute(opcode, *operands).tolist() == [0x7FFFFFFF] * 2, opcode


def test_pairs_of_float32():
    a, b, c = (draw(4, seed, "f32") for seed in (1, 2, 3))
    packed = [x.view(np.uint64) for x in (a, b, c)]
    same_bits(execute("fma.rn.f32x2", *packed).view(np.uint32), execute("fma.rn.f32", a, b, c))
    one = np.broadcast_to(packed[1][:1], 1)
    repeated = np.tile(b[:2], N // 2)
    same_bits(execute("mul.f32x2", packed[0], one).view(np.uint32), execute("mul.f32", a, repeated))


def test_subnormal_results_are_flushed():
    tiny = np.array([2.0**-126, 2.0**-140, -(2.0**-140)], np.float32).view(np.uint32)
    half = np.full(3, 0.5, np.float32).view(np.uint32)
    assert execute("mul.ftz.f32", tiny, half).tolist() == [0, 0, 0x80000000]
    expected = (tiny.view(np.float32) * np.float32(0.5)).view(np.uint32)
    assert execute("mul.f32", tiny, half).tolist() == expected.tolist()
    assert execute("ex2.approx.ftz.f32", np.float32([-130, -200]).view(np.uint32)).tolist() == [
        0,
        0,
    ]


@pytest.mark.parametrize("name", ["min", "max"])
def test_extrema(name):
    a, b = draw(4, 1, "f32"), draw(4, 2, "f32")
    choose = min if name == "min" else max

    def expected(keep_nan):
        for x, y in zip(a.view(np.float32).tolist(), b.view(np.float32).tolist(), strict=True):
            if x != x or y != y:
                yield np.nan if keep_nan or (x != x and y != y) else y if x != x else x
            else:  # zeros are ordered by their signs
                yield choose(x, y, key=lambda v: (v, np.copysign(1, v)))

    got, strict = execute(f"{name}.f32", a, b), execute(f"{name}.NaN.f32", a, b)
    same_bits(got, np.array([*expected(False)], np.float32).view(np.uint32))
    same_bits(strict, np.array([*expected(True)], np.float32).view(np.uint32))
    c = draw(4, 5, "f32")
    same_bits(execute(f"{name}.f32", a, b, c), execute(f"{name}.f32", got, c))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_half_precision(name, kind):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b = (torch.from_numpy(draw(2, seed, kind).view(np.int16)).view(dtype) for seed in (1, 2))
    exact = getattr(torch, name)(a.double(), b.double())  # of two halves, exact or nearly so
    got = execute(f"{name}.{kind}", *(x.view(torch.int16).numpy().view(np.uint16) for x in (a, b)))
    got = torch.from_numpy(got.view(np.int16)).view(dtype)
    torch.testing.assert_close(got, getattr(torch, name)(a, b), rtol=0, atol=0, equal_nan=True)
    known = exact.isfinite() & got.isfinite()
    assert ((got.double() - exact)[known].abs() <= exact[known].abs() * 2.0**-8 + 2.0**-24).all()


APPROXIMATE = {
    "ex2.approx.ftz.f32": (np.exp2, 2, (-100, 100)),
    "rcp.approx.ftz.f32": (np.reciprocal, 1, (0.01, 1000)),
    "rsqrt.approx.ftz.f32": (lambda x: 1.0 / np.sqrt(x), 2, (0.01, 1000)),
    "div.full.f32": (np.divide, 2, (0.01, 1000)),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_err_within_their_bounds(name):
    """Not at all unless they are perturbed; then as far as they may, and always the same way."""
    function, units, span = APPROXIMATE[name]
    rng = np.random.default_rng(0)
    n = 2 if name.startswith("div") else 1
    operands = [rng.uniform(*span, 2000).astype(np.float32) for _ in range(n)]
    exact = function(*(x.astype(np.float64) for x in operands))
    unit = np.spacing(exact.astype(np.float32))
    bits = [x.view(np.uint32) for x in operands]
    nearest = execute(name, *bits).view(np.float32)
    np.testing.assert_array_equal(nearest, exact.astype(np.float32))
    for seed in (1, 2):
        got = execute(name, *bits, perturb=Perturbation(seed)).view(np.float32)
        error = (got.astype(np.float64) - exact) / unit
        assert units - 0.5 <= np.abs(error).max() <= units + 0.5
        assert len(np.unique(np.round(error))) >= 2 * units + 1
        again = execute(name, *(x[::-1] for x in bits), perturb=Perturbation(seed))
        np.testing.assert_array_equal(again[::-1].view(np.float32), got)
    other = execute(name, *bits, perturb=Perturbation(1)).view(np.float32)
    assert (other != got).any()


def test_logarithms_err_absolutely_near_one():
    x = np.linspace(0.3, 3, 3001, dtype=np.float32)
    exact = np.log2(x.astype(np.float64))
    got = execute("lg2.approx.ftz.f32", x.view(np.uint32), perturb=Perturbation(1))
    error = np.abs(got.view(np.float32).astype(np.float64) - exact)
    bound = np.where((x > 0.5) & (x < 2), 1, np.abs(exact)) * 2.0**-22
    assert (error <= bound + np.spacing(np.abs(exact).astype(np.float32))).all()
    assert error.max() > 2.0**-23
    exact_ones = np.float32([0.25, 0.5, 1, 2, 4]).view(np.uint32)
    got = execute("lg2.approx.ftz.f32", exact_ones, perturb=Perturbation(1))
    assert got.view(np.float32).tolist() == [-2, -1, 0, 1, 2]


# --- conversions


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversions_of_halves(kind):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    wide = draw(4, 1, "f32")
    wide[: N // 4] = np.random.default_rng(0).normal(0, 1000, N // 4).astype(np.float32).view("u4")
    expected = torch.from_numpy(wide.view(np.float32)).to(dtype)
    got = torch.from_numpy(execute(f"cvt.rn.{kind}.f32", wide).view(np.int16)).view(dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    back = execute(f"cvt.f32.{kind}", got.view(torch.int16).numpy().view(np.uint16))
    torch.testing.assert_close(
        torch.from_numpy(back.view(np.float32)), expected.float(), rtol=0, atol=0, equal_nan=True
    )
    low = draw(4, 2, "f32")
    both = execute(f"cvt.rn.{kind}x2.f32", wide, low)  # the first operand becomes the upper half
    same_bits((both >> 16).astype(np.uint16), execute(f"cvt.rn.{kind}.f32", wide))
    same_bits((both & 0xFFFF).astype(np.uint16), execute(f"cvt.rn.{kind}.f32", low))


@pytest.mark.parametrize("to", ["u8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("of", ["u8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_conversions_of_integers(to, of):
    a = draw(WIDTH[of], 1)
    expected = [x % 256 ** WIDTH[to] for x in as_int(a, of)]
    assert execute(f"cvt.{to}.{of}", a).tolist() == expected


@pytest.mark.parametrize("of", ["u16", "s32", "u32", "s64", "u64"])
def test_integers_to_float32(of):
    a = draw(WIDTH[of], 1)
    got = execute(f"cvt.rn.f32.{of}", a).view(np.float32)
    expected = [rounded(Fraction(x)) for x in as_int(a, of)]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


@pytest.mark.parametrize("to", ["u32", "s32", "s64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float32_to_integers(mode, to):
    """Numbers beyond the type become its limits, NaN becomes 0."""
    a = draw(4, 1, "f32")
    a[:50] = (np.arange(-25, 25, dtype=np.float32) / 2).view(np.uint32)
    limits = np.iinfo(TYPES[to])
    whole = {"rni": round, "rzi": int, "rmi": np.floor, "rpi": np.ceil}[mode]

    def converted(x):
        if x != x:
            return 0
        if np.isinf(x):
            return limits.max if x > 0 else limits.min
        return min(max(int(whole(x)), limits.min), limits.max)

    expected = [converted(x) for x in a.view(np.float32).tolist()]
    assert as_int(execute(f"cvt.{mode}.{to}.f32", a), to) == expected
    floats = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    same_bits(execute(f"cvt.{mode}.f32.f32", a), floats(a.view(np.float32)).view(np.uint32))


UNKNOWN = [
    *("sin.approx.f32", "add.sat.f32", "add.rz.f32", "cvt.rz.f32.f64", "cvt.s32.f32", "mul.f64"),
    *("cvt.rn.f16.s32", "div.f64", "fma.rn.bf16", "prmt.f4e.b32", "bfi.b32", "add.f8"),
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_has_no_semantics_is_an_error(text):
    with pytest.raises(UnknownInstructionError):
        operation(tuple(text.split(".")), 2)
