"""The integer arithmetic of the machine code, on registers that may be unknown.

A register is an int in [0, 2³²), a predicate a bool; either is a scalar for all threads or an array
with a value per thread. None is unknown, and everything that depends on it is unknown too.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sass import Instruction

Value = Any
Operands = tuple[str, ...]
_M32, _SIGN = 2**32 - 1, 2**31
_NUMBERED = re.compile(r"U?R\d+")
_PREDICATE = re.compile(r"!?U?P[0-6T]")
_ZERO, _TRUE = ("RZ", "URZ", "SRZ"), ("PT", "UPT")


class Registers:
    """The values of the threads' registers and predicates, by name."""

    def __init__(self, constants: Mapping[int, int], special: Mapping[str, Value]) -> None:
        self.values: dict[str, Value] = {}
        self.constants = constants  # 32-bit words of constant bank 0, by offset
        self.special = special  # the numbers of thread and program

    def read(self, operand: str) -> Value:
        """A register, predicate, constant or immediate value; None for floating-point numbers."""
        sign = operand[0]
        if sign in "!~" or (sign == "-" and operand[1] in "RUc"):
            value = self.read(operand[1:])
            if value is None:
                return None
            if sign == "!":
                return not_(value)
            return (~value if sign == "~" else -value) & _M32
        if operand in _ZERO or operand in _TRUE:
            return operand in _TRUE or 0
        if operand in self.values:
            return self.values[operand]
        if sign == "c":
            return self.constants.get(_offset(operand))
        return None if sign in "RUPS" else _immediate(operand)

    def pair(self, operand: str) -> Value:
        """64 bits, from a register and the next."""
        if operand[0] == "c":
            low, high = (self.constants.get(_offset(operand) + at) for at in (0, 4))
        elif not _NUMBERED.fullmatch(operand):
            return self.read(operand)
        else:
            low, high = self.read(operand), self.read(following(operand))
        return None if low is None or high is None else low | high << 32

    def results(self, instruction: Instruction) -> dict[str, Value]:
        """The values that an instruction writes."""
        meaning = MEANINGS.get(instruction.opcode.partition(".")[0])
        if meaning is None:
            return dict.fromkeys(written(instruction))
        return meaning(self, instruction.opcode, instruction.operands)


def not_(value: Value) -> Value:
    """Negate a predicate."""
    return not value if isinstance(value, bool) else ~value


def and_(a: Value, b: Value) -> Value:
    """Both predicates; false if one is, whatever the other."""
    if any(x is not None and not np.any(x) for x in (a, b)):
        return False
    return None if a is None or b is None else a & b


def choose(condition: Value, a: Value, b: Value) -> Value:
    """``a`` where the predicate is true, elsewhere ``b``; what none gets may be unknown."""
    if condition is None:
        return None
    if np.all(condition):
        return a
    if not np.any(condition):
        return b
    return None if a is None or b is None else np.where(condition, a, b)


@functools.cache
def following(register: str, by: int = 1) -> str:
    """The register after one."""
    prefix = register.rstrip("0123456789")
    return f"{prefix}{int(register[len(prefix) :]) + by}" if prefix != register else register


@functools.cache
def written(instruction: Instruction) -> tuple[str, ...]:
    """The registers and predicates that an instruction not modelled here may write."""
    names: list[str] = []
    for operand in instruction.operands:
        if _NUMBERED.fullmatch(operand):
            double = re.match(r"D(ADD|MUL|FMA)|F2F\.F64|I2F\.F64|F2I\.[SU]64", instruction.opcode)
            wide = instruction.unit in ("load", "shared", "atomic")
            count = max(1, instruction.width // 4) if wide else 2 if double else 1
            names += [following(operand, i) for i in range(count)]
        elif _PREDICATE.fullmatch(operand):
            names.append(operand)
            continue
        break
    return tuple(name for name in names if name not in _TRUE)


@functools.cache
def _immediate(operand: str) -> int | None:
    try:
        return int(operand, 16) & _M32
    except ValueError:
        return None


@functools.cache
def _offset(operand: str) -> int:
    found = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand)
    return int(found[1], 16) if found else -1


def _signed(value: Value) -> Value:
    return (value ^ _SIGN) - _SIGN


# ------------------------------------------------------------------ one register, of known values


def _shift(opcode: str, low: Value, by: Value, high: Value) -> Value:
    if ".L" in opcode:
        return (high << 32 | low) << by >> (32 if ".HI" in opcode else 0)
    if ".HI" in opcode:
        return (_signed(high) if ".S" in opcode else high) >> by
    return (high << 32 | low) >> by


def _permute(opcode: str, low: Value, order: int, high: Value) -> Value:
    result: Value = 0
    for k in range(4):
        nibble = order >> 4 * k & 15
        byte = (high if nibble & 4 else low) >> 8 * (nibble & 3) & 255
        result = result | ((byte >> 7) * 255 if nibble & 8 else byte) << 8 * k
    return result


def _extend(opcode: str, value: Value, bits: int) -> Value:
    value, sign = value & ((1 << bits) - 1), 1 << bits - 1
    return value if ".U32" in opcode else (value ^ sign) - sign


def _smaller(opcode: str, a: Value, b: Value, smallest: Value) -> Value:
    less = a < b if ".U32" in opcode else _signed(a) < _signed(b)
    return np.where(less == smallest, a, b)


def _bits(number: Value) -> Value:
    return np.asarray(number, np.float32).view(np.uint32).astype(np.int64)


def _from_integer(opcode: str, value: Value) -> Value:
    if "64" in opcode:  # of two registers
        return None
    return _bits(value if ".U32" in opcode else _signed(value))


def _to_integer(opcode: str, value: Value) -> Value:
    return np.asarray(value, np.uint32).view(np.float32).astype(np.int64)


def _reciprocal(opcode: str, value: Value) -> Value:
    """The reciprocal that integer divisions start from; other functions are unknown."""
    number = np.asarray(value, np.uint32).view(np.float32)
    return _bits(1 / number) if ".RCP" in opcode and np.all(number != 0) else None


_PLAIN: dict[str, Callable[..., Value]] = {
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), lambda _, a: a),
    **dict.fromkeys(("SEL", "USEL"), lambda _, a, b, p: choose(p, a, b)),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    **dict.fromkeys(("SGXT", "USGXT"), _extend),
    "IABS": lambda _, a: abs(_signed(a)),
    "VIADDMNMX": lambda opcode, a, b, c, p: _smaller(opcode, a + b & _M32, c, p),
    **{"I2F": _from_integer, "I2FP": _from_integer, "F2I": _to_integer, "MUFU": _reciprocal},
    **dict.fromkeys(("POPC", "UPOPC"), lambda _, a: np.bitwise_count(a).astype(np.int64)),
    **dict.fromkeys(("IMNMX", "VIMNMX", "UIMNMX"), _smaller),
}


def _plain(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    values = [r.read(x) for x in operands[1:]]
    if any(x is None for x in values):
        return {operands[0]: None}
    value = _PLAIN[opcode.partition(".")[0]](opcode, *values)
    return {operands[0]: None if value is None else value & _M32}


# ------------------------------------------------------------------ sums with carries


def _lea(opcode: str, a: Value, b: Value, *rest: Value) -> Value:
    *high, shift = rest
    if ".HI" not in opcode:
        return (a << shift & _M32) + b
    top = high[0] if high else _signed(a) >> 32 & _M32
    return ((top << 32 | a) << shift >> 32 & _M32) + b


def _multiply(opcode: str, a: Value, b: Value, c: Value) -> Value:
    if (".WIDE" in opcode or ".HI" in opcode) and ".U32" not in opcode:
        a, b = _signed(a), _signed(b)
    return a * b + c


_SUMS: dict[str, Callable[..., Value]] = {
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD"), lambda _, *terms: sum(terms)),
    **dict.fromkeys(("LEA", "ULEA"), _lea),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply),
}


@functools.cache
def _parts(operands: Operands) -> tuple[list[str], list[str], list[str]]:
    """Predicates written, sources, and predicates read, between a register written."""
    rest = list(operands[1:])
    first = next(i for i, x in enumerate(rest) if not _PREDICATE.fullmatch(x))
    end = next(i for i in range(len(rest), 0, -1) if not _PREDICATE.fullmatch(rest[i - 1]))
    return [x for x in rest[:first] if x not in _TRUE], rest[first:end], rest[end:]


def _sum(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    carries, sources, added = _parts(operands)
    wide = ".WIDE" in opcode or (".HI" in opcode and "IMAD" in opcode)
    values = [r.read(x) for x in sources]
    if wide:
        values[2] = r.pair(sources[2])
    if "IMAD" in opcode and any(x in _ZERO for x in sources[:2]):
        values[:2] = 0, 0
    names = [operands[0], following(operands[0])] if ".WIDE" in opcode else [operands[0]]
    before = [r.read(x) for x in added] if ".X" in opcode else []
    if any(x is None for x in (*values, *before)):
        return dict.fromkeys([*names, *carries])
    total = sum(before, _SUMS[opcode.partition(".")[0]](opcode, *values))
    if wide:
        words = [total & _M32, total >> 32 & _M32]
        return dict(zip(names, words if ".WIDE" in opcode else words[1:], strict=True))
    return {operands[0]: total & _M32} | dict.fromkeys(carries, total >> 32 != 0)


# ------------------------------------------------------------------ predicates


def _compare(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    first, second, x, y, joined, *of_low = operands
    a, b, other = (r.read(name) for name in (x, y, joined))
    how = opcode.split(".")[1].lower()
    result = None
    if "ISETP" in opcode and a is not None and b is not None:
        if ".U32" not in opcode:
            a, b = _signed(a), _signed(b)
        if ".EX" not in opcode:
            result = getattr(operator, how)(a, b)
        elif (low := r.read(of_low[0])) is not None:  # the low words' comparison decides ties
            strictly = {"le": "lt", "ge": "gt", "eq": "ne"}.get(how, how)
            decided = getattr(operator, strictly)(a, b)
            result = (decided & (how != "eq")) | ((a == b) & low)
    written = {}
    for name, one in ((first, result), (second, None if result is None else not_(result))):
        if ".OR" in opcode:
            one, joint = (None if p is None else not_(p) for p in (one, other))
            one = and_(one, joint)
            written[name] = None if one is None else not_(one)
        elif ".XOR" in opcode:
            written[name] = None if one is None or other is None else one ^ other
        else:
            written[name] = and_(one, other)
    return written


def _truth(values: Sequence[Value], table: int) -> Value:
    """A truth table of three predicates; the result may be known if one of them is not."""
    for at, value in enumerate(values):
        if value is None:
            tried = [_truth([*values[:at], x, *values[at + 1 :]], table) for x in (False, True)]
            same = all(x is not None for x in tried) and np.array_equal(
                *np.broadcast_arrays(*tried)
            )
            return tried[0] if same else None
    index = sum(x * weight for x, weight in zip(values, (4, 2, 1), strict=True))
    return (table >> index & 1) == 1


def _predicate_logic(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    first, second, *sources, table, other = operands
    values = [r.read(x) for x in sources]
    return {name: _truth(values, int(t, 16)) for name, t in ((first, table), (second, other))}


def _logic(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    names = operands[:-5]  # a predicate, if the result is compared with 0, and the register
    values = [r.read(x) for x in operands[-5:-2]]
    if any(x is None for x in values):
        return dict.fromkeys(names)
    table, result = int(operands[-2], 16), 0
    for k in range(8):
        if table >> k & 1:
            terms = (x if k & bit else ~x for bit, x in zip((4, 2, 1), values, strict=True))
            result = result | functools.reduce(operator.and_, terms) & _M32
    return {names[-1]: result} | dict.fromkeys(names[:-1], result != 0)


# ------------------------------------------------------------------ the rest


def _special(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    count = 2 if opcode.startswith("CS2R") and ".32" not in opcode else 1
    return {following(operands[0], i): r.special.get(operands[1]) for i in range(count)}


def _constants(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    count = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    at = _offset(operands[1])
    return {following(operands[0], i): r.constants.get(at + 4 * i) for i in range(count)}


def _halves(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    """The compiler encodes many 32-bit constants as 0 · 0 + two float16 numbers."""
    name, x, y, *numbers = operands
    if (x, y) != ("-RZ", "RZ") or len(numbers) != 2:
        return {name: None}
    high, low = (int(np.float16(n.replace("QNAN", "NAN")).view(np.uint16)) for n in numbers)
    return {name: high << 16 | low}


def _shuffle(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    """A shuffle of a value that is the same in all threads."""
    value = r.read(operands[2])
    return {operands[1]: value if isinstance(value, int) else None, operands[0]: None}


def _pack(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    kept, mask = r.read(operands[2]), r.read(operands[3])
    bits = [(k, r.read(f"P{k}")) for k in range(7) if mask >> k & 1]
    if "." in opcode or kept is None or any(value is None for _, value in bits):
        return {operands[0]: None}
    return {operands[0]: (kept & ~mask) | sum(value * (1 << k) for k, value in bits)}


def _unpack(r: Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    value, mask = r.read(operands[1]), r.read(operands[2])
    bits = {f"P{k}": k for k in range(7) if mask >> k & 1}
    return {name: None if value is None else (value >> k & 1) == 1 for name, k in bits.items()}


MEANINGS: dict[str, Callable[[Registers, str, Operands], dict[str, Value]]] = {
    **dict.fromkeys(_PLAIN, _plain),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    **dict.fromkeys(("ISETP", "UISETP", "FSETP", "HSETP2", "DSETP"), _compare),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("LDC", "ULDC"), _constants),
    **{"HFMA2": _halves, "SHFL": _shuffle, "P2R": _pack, "R2P": _unpack},
    "FCHK": lambda r, opcode, operands: {operands[0]: False},  # no division takes its slow path
}
