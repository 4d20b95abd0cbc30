"""Which instructions a program executes, and what its loads and stores touch, without its data.

Loop bounds and addresses are integer arithmetic on a launch's arguments, the program's and the
thread's number. `walk` does that arithmetic for all threads of a program at once, as 32-bit
registers; whatever comes from memory or is floating-point is unknown, except that tensors of
integers (targets, counts) hold 0. Then

- a branch is followed where its predicate is known; threads that part meet again at the lowest
  address, as on the hardware;
- one whose predicate is unknown is not taken: what it would skip is executed, so that all mentors
  are active and all rows valid;
- the first such branch after a global atomic asks whether the program is the last to arrive. It
  is, and what it executes from there on is the tail, which the others do not.

A loop whose end is unknown is an error, as is an instruction whose time the simulator cannot tell.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sass import Instruction

M32, M64, SIGN = 2**32 - 1, 2**64 - 1, 2**31
SECTOR = 32  # bytes
LIMIT = 5_000_000  # instructions of a warp
SPACE = 36  # bits of address that each tensor has to itself
Value = Any  # a register: an int, an array of one for each thread, or None for unknown
Operands = tuple[str, ...]


class UnknownControlError(Exception):
    """The kernel does what this reading of it cannot follow."""


class Caches(NamedTuple):
    """How many bytes a program may touch until a line that it touched has left L1, and L2."""

    l1: float
    l2: float
    shared_is_cold: bool  # whether what programs share must come from memory once for each


class Walked(NamedTuple):
    """What `simulator.play` takes, of one program."""

    path: np.ndarray  # [steps, 3]
    tail: np.ndarray  # [steps, 3], of the last program; empty if nothing asks for it
    traffic: np.ndarray  # [accesses, warps, 4], of both


class _Registers:
    """Registers, predicates and constants of all threads."""

    def __init__(self, constants: Mapping[int, int], special: Mapping[str, Value]) -> None:
        self.values: dict[str, Value] = {}
        self.constants, self.special = constants, special

    def read(self, operand: str) -> Value:
        """A 32-bit operand; None if it is unknown."""
        if operand[0] == "-" and not operand.startswith("-0x"):
            value = self.read(operand[1:])
            return None if value is None else -value & M32
        if operand[0] == "~":
            value = self.read(operand[1:])
            return None if value is None else ~value & M32
        if operand in ("RZ", "URZ", "SRZ"):
            return 0
        if operand[0] in "RU":
            return self.values.get(operand)
        if operand.startswith("c["):
            return self.constants.get(_constant(operand))
        return _immediate(operand)

    def pair(self, operand: str) -> Value:
        """64 bits."""
        if operand.startswith("c["):
            at = _constant(operand)
            low, high = self.constants.get(at), None if at is None else self.constants.get(at + 4)
        elif operand in ("RZ", "URZ") or operand[0] not in "RU":
            return self.read(operand)
        else:
            low, high = self.read(operand), self.read(_next(operand))
        return None if low is None or high is None else low | (high << 32)

    def predicate(self, operand: str) -> Value:
        """True, False, an array of them, or None."""
        if operand[0] == "!":
            value = self.predicate(operand[1:])
            return None if value is None else _not(value)
        return True if operand in ("PT", "UPT") else self.values.get(operand)


@functools.cache
def _immediate(operand: str) -> int | None:
    try:
        return int(operand, 16) & M32
    except ValueError:
        return None  # a floating-point number, or a part of a register


@functools.cache
def _constant(operand: str) -> int | None:
    found = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand)
    return int(found[1], 16) if found else None


@functools.cache
def _next(register: str, by: int = 1) -> str:
    if register in ("RZ", "URZ"):
        return register
    prefix = register.rstrip("0123456789")
    return f"{prefix}{int(register[len(prefix) :]) + by}"


def _not(value: Value) -> Value:
    return not value if isinstance(value, bool) else ~value


@functools.cache
def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P[0-6T]", operand) is not None


def _signed(value: Value) -> Value:
    return (value ^ SIGN) - SIGN


def _choose(condition: Value, a: Value, b: Value) -> Value:
    if condition is None:
        return None
    if isinstance(condition, (bool, np.bool_)):
        return a if condition else b
    return None if a is None or b is None else np.where(condition, a, b)


def _combine(opcode: str, a: Value, b: Value) -> Value:
    """A comparison with the predicate that is joined to it: either alone may decide."""
    if ".OR" in opcode:
        a, b = (None if x is None else _not(x) for x in (a, b))
        both = _and(a, b)
        return None if both is None else _not(both)
    if ".XOR" in opcode:
        return None if a is None or b is None else a ^ b
    return _and(a, b)


def _and(a: Value, b: Value) -> Value:
    for x in (a, b):
        if x is not None and not np.any(x):
            return False
    return None if a is None or b is None else a & b


# ------------------------------------------------------------------ what integer instructions do
# Each takes registers, opcode and operands and gives what it writes: register or predicate → value.


def _add(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    written, carries, sources = _split(operands)
    terms = [r.read(x) for x in sources]
    terms += [r.predicate(x) for x in carries[1]]
    if any(term is None for term in terms):
        return dict.fromkeys([written, *carries[0]])
    total = sum(term * 1 for term in terms)
    return {written: total & M32} | dict.fromkeys(carries[0], total >> 32 != 0)


@functools.cache
def _split(operands: Operands) -> tuple[str, tuple[list[str], list[str]], list[str]]:
    """The register written, predicates written and read, and the sources between them."""
    rest = list(operands[1:])
    out = []
    while rest and _is_predicate(rest[0]):
        out.append(rest.pop(0))
    into: list[str] = []
    while rest and _is_predicate(rest[-1]):
        into.insert(0, rest.pop())
    return operands[0], ([x for x in out if x[-1] != "T"], into), rest


def _multiply(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    written, (out, into), (x, y, z) = _split(operands)
    a, b = r.read(x), r.read(y)
    wide, high = ".WIDE" in opcode, ".HI" in opcode
    c = r.pair(z) if wide or high else r.read(z)
    if ".X" in opcode and c is not None:
        carry = r.predicate(into[0])
        c = None if carry is None else c + carry
    if x in ("RZ", "URZ") or y in ("RZ", "URZ"):
        a = b = 0
    both = [written, _next(written)] if wide else [written]
    if a is None or b is None or c is None:
        return dict.fromkeys([*both, *out])
    if ".U32" not in opcode and (wide or high):
        a, b = _signed(a), _signed(b)
    total = a * b + c
    parts = [total & M32, (total >> 32) & M32]
    if high:
        return {written: parts[1]}
    return dict(zip(both, parts, strict=False)) | dict.fromkeys(out)


def _shift_add(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    written, (out, into), sources = _split(operands)
    values = [r.read(x) for x in sources]
    carries = [r.predicate(x) for x in into] if ".X" in opcode else []
    if any(x is None for x in (*values, *carries)):
        return dict.fromkeys([written, *out])
    a, b, *high, shift = values
    if ".HI" in opcode:
        top = high[0] if high else (_signed(a) >> 32) & M32
        a = ((top << 32 | a) << shift) >> 32 & M32
    else:
        a = a << shift & M32
    total = a + b + sum(x * 1 for x in carries)
    return {written: total & M32} | dict.fromkeys(out, total >> 32 != 0)


def _shift(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    low, by, high = (r.read(x) for x in operands[1:4])
    if low is None or high is None or not isinstance(by, int):
        return {operands[0]: None}
    if ".L" in opcode:
        value = (high << 32 | low) << by >> (32 if ".HI" in opcode else 0)
    elif ".HI" in opcode:
        value = (_signed(high) if ".S" in opcode else high) >> by
    else:
        value = (high << 32 | low) >> by
    return {operands[0]: value & M32}


def _logic(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    out = [operands[0]] if _is_predicate(operands[0]) else []
    written, *sources, table, _ = operands[len(out) :]
    value = _table([r.read(x) for x in sources], int(table, 16), M32)
    return {written: value} | dict.fromkeys(out, None if value is None else value != 0)


def _table(values: Sequence[Value], table: int, ones: int) -> Value:
    """Any bitwise function of three values, given as its truth table; unknown ones may not matter.

    For predicates ``ones`` is 1.
    """
    known = [x if x is not None else 0 for x in values]
    result: Value = 0
    for k in range(8):
        if table >> k & 1:
            term: Value = ones
            for bit, x in zip((4, 2, 1), known, strict=True):
                term = term & (x if k & bit else ~x & ones)
            result = result | term
    for i, x in enumerate(values):
        step = 4 >> i
        depends = any((table >> k & 1) != (table >> (k ^ step) & 1) for k in range(8))
        if x is None and depends:
            return None
    return result


def _predicate_logic(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    first, second, *sources, table_1, table_2 = operands
    values = [r.predicate(x) for x in sources]
    written = {}
    for name, table in ((first, table_1), (second, table_2)):
        written[name] = _decided(values, int(table, 16))
    return written


def _decided(values: Sequence[Value], table: int) -> Value:
    """The truth table at predicates of which some are unknown and some are constants."""
    if None in [x if x is None else 0 for x in values]:
        at = next(i for i, x in enumerate(values) if x is None)
        tried = [_decided([*values[:at], x, *values[at + 1 :]], table) for x in (False, True)]
        same = tried[0] is not None and tried[1] is not None and np.all(tried[0] == tried[1])
        return tried[0] if same else None
    index = sum(x * weight for x, weight in zip(values, (4, 2, 1), strict=True))
    result = table >> index & 1
    return bool(result) if isinstance(result, int) else result.astype(bool)


_COMPARED: dict[str, Callable[[Value, Value], Value]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _compare(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    first, second, x, y, joined, *low = operands
    a, b = r.read(x), r.read(y)
    how = opcode.split(".")[1]
    result = None
    if opcode.startswith(("ISETP", "UISETP")) and a is not None and b is not None:
        if ".U32" not in opcode:
            a, b = _signed(a), _signed(b)
        result = _COMPARED[how](a, b)
        if ".EX" in opcode:  # the high words, after a comparison of the low ones
            of_low = r.predicate(low[0])
            strict = {"LE": "LT", "GE": "GT"}.get(how, how)
            if of_low is None:
                result = None
            elif how == "NE":
                result = result | of_low
            elif how == "EQ":
                result = result & of_low
            else:
                result = _COMPARED[strict](a, b) | ((a == b) & of_low)
    other = r.predicate(joined)
    inverse = None if result is None else _not(result)
    return {first: _combine(opcode, result, other), second: _combine(opcode, inverse, other)}


def _select(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    a, b = r.read(operands[1]), r.read(operands[2])
    return {operands[0]: _choose(r.predicate(operands[3]), a, b)}


def _smaller(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    a, b, smallest = r.read(operands[1]), r.read(operands[2]), r.predicate(operands[3])
    if a is None or b is None:
        return {operands[0]: None}
    key = (lambda x: x) if ".U32" in opcode else _signed
    less = key(a) < key(b)
    return {operands[0]: _choose(smallest, _choose(less, a, b), _choose(less, b, a))}


def _move(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    return {operands[0]: r.read(operands[1])}


def _special(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    value = r.special.get(operands[1])
    written = {operands[0]: value}
    if opcode.startswith("CS2R") and ".32" not in opcode:
        written[_next(operands[0])] = value
    return written


def _load_constant(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    written, at = operands[0], _constant(operands[1])
    count = 2 if ".64" in opcode else 4 if ".128" in opcode else 1
    return {
        _next(written, i): None if at is None else r.constants.get(at + 4 * i) for i in range(count)
    }


def _permute(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    low, order, high = (r.read(x) for x in operands[1:4])
    if low is None or high is None or not isinstance(order, int):
        return {operands[0]: None}
    result: Value = 0
    for k in range(4):
        nibble = order >> 4 * k & 15
        byte = (high if nibble & 4 else low) >> 8 * (nibble & 3) & 255
        byte = (byte >> 7) * 255 if nibble & 8 else byte
        result = result | byte << 8 * k
    return {operands[0]: result}


def _extend(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    value, bits = r.read(operands[1]), r.read(operands[2])
    if value is None or not isinstance(bits, int):
        return {operands[0]: None}
    value = value & ((1 << bits) - 1)
    if ".U32" not in opcode:
        value = ((value ^ 1 << bits - 1) - (1 << bits - 1)) & M32
    return {operands[0]: value}


def _half_pair(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    """0 · 0 + two float16 constants is how the compiler writes many a 32-bit constant."""
    written, x, y, *halves = operands
    if (x, y) != ("-RZ", "RZ") or len(halves) != 2:
        return {written: None}
    high, low = (int(np.float16(half.replace("QNAN", "nan")).view(np.uint16)) for half in halves)
    return {written: high << 16 | low}


def _pack(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    kept, mask = r.read(operands[2]), r.read(operands[3])
    bits = [(k, r.predicate(f"P{k}")) for k in range(7) if mask >> k & 1]
    if kept is None or any(value is None for _, value in bits):
        return {operands[0]: None}
    return {operands[0]: (kept & ~mask & M32) | sum((value * 1) << k for k, value in bits)}


def _unpack(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    value, mask = r.read(operands[1]), r.read(operands[2])
    return {
        f"P{k}": None if value is None else (value >> k & 1) == 1 for k in range(7) if mask >> k & 1
    }


def _false(r: _Registers, opcode: str, operands: Operands) -> dict[str, Value]:
    """Whether a division needs its slow path."""
    return {operands[0]: False}


SEMANTICS: dict[str, Callable[[_Registers, str, Operands], dict[str, Value]]] = {
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), _move),
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD"), _add),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply),
    **dict.fromkeys(("LEA", "ULEA"), _shift_add),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    **dict.fromkeys(("ISETP", "UISETP", "FSETP", "HSETP2", "DSETP"), _compare),
    **dict.fromkeys(("SEL", "USEL"), _select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "UIMNMX"), _smaller),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("LDC", "ULDC"), _load_constant),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    **dict.fromkeys(("SGXT", "USGXT"), _extend),
    "HFMA2": _half_pair,
    "P2R": _pack,
    "R2P": _unpack,
    "FCHK": _false,
}


def _unknown(instruction: Instruction) -> dict[str, Value]:
    """All that an instruction without semantics may write."""
    written: list[str] = []
    for operand in instruction.operands:
        if _is_predicate(operand):
            written.append(operand)
            continue
        if re.fullmatch(r"U?R\d+", operand):
            doubled = re.match(r"D(ADD|MUL|FMA)|F2F\.F64|I2F\.F64|F2I\.[SU]64", instruction.opcode)
            wide = instruction.unit in ("load", "shared") or "ATOM" in instruction.opcode
            count = max(1, instruction.width // 4) if wide else 2 if doubled else 1
            written += [_next(operand, i) for i in range(count)]
        break
    return dict.fromkeys(written)


# ------------------------------------------------------------------ the walk


def walk(
    code: Sequence[Instruction],
    constants: Mapping[int, int],
    integers: Sequence[bool],
    grid: Sequence[int],
    n_warps: int,
    caches: Caches,
) -> Walked:
    """Walk through the program in the middle of the grid, as if it were the last to arrive.

    Args:
        constants: 32-bit words of constant bank 0, by offset; pointers are tensor << SPACE.
        integers: for each tensor whether it holds integers.

    """
    return _Walk(code, constants, integers, grid, n_warps, caches).run()


class _Walk:
    def __init__(
        self,
        code: Sequence[Instruction],
        constants: Mapping[int, int],
        integers: Sequence[bool],
        grid: Sequence[int],
        n_warps: int,
        caches: Caches,
    ) -> None:
        self.code, self.integers, self.caches = code, integers, caches
        self.n_warps, self.n_threads = n_warps, 32 * n_warps
        self.index = {instruction.address: i for i, instruction in enumerate(code)}
        # A neighbour walks beside it: what both touch, all programs share.
        middle = grid[0] // 2
        programs = np.repeat([middle, middle - 1 if middle else 0], self.n_threads)
        thread = np.tile(np.arange(self.n_threads), 2)
        special = {
            **{"SR_TID.X": thread, "SR_LANEID": thread % 32, "SRZ": 0, "SR_CTAID.X": programs},
            **dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CgaCtaId"), 0),
            **dict.fromkeys(("SR_CTAID.Y", "SR_CTAID.Z"), 0),
        }
        self.registers = _Registers(constants, special)
        self.performs = [self._perform(instruction) for instruction in code]
        self.steps: list[tuple[int, int, int]] = []
        self.traffic: list[np.ndarray] = []
        self.touched: dict[int, float] = {}  # sector → bytes touched when it last was
        self.cached: dict[int, float] = {}  # likewise, by loads that go through L1
        self.shared: set[int] = set()  # sectors that the neighbour touches
        self.bytes_touched = 0.0
        self.atomic = False
        self.decision = 0

    def run(self) -> Walked:
        here: dict[int, np.ndarray] = {0: np.ones(2 * self.n_threads, bool)}
        while here:  # those behind go on first, so that threads that parted meet
            at = min(here)
            active = here.pop(at)
            stop = min(here, default=len(self.code))
            for next_at, threads in self._straight(at, stop, active):
                if next_at in here:
                    here[next_at] = here[next_at] | threads
                elif threads.any():
                    here[next_at] = threads
            if len(self.steps) > LIMIT:
                raise UnknownControlError(f"no end after {LIMIT:,} instructions")
        path = np.array(self.steps, np.int64)
        traffic = np.array(self.traffic or [np.zeros((self.n_warps, 4))], np.float64)
        end = self.decision or len(path)
        return Walked(path[:end], path[end:], traffic)

    def _straight(self, at: int, stop: int, active: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Execute until a branch, or until others wait at ``stop``; who goes on where."""
        mine = active[: self.n_threads].reshape(self.n_warps, 32).any(1)
        warps = int(mine @ (1 << np.arange(self.n_warps)))
        everyone = bool(active.all())
        values = self.registers.values
        while at < stop:
            instruction, perform = self.code[at], self.performs[at]
            number = -1
            if isinstance(perform, tuple):  # writes what is unknown
                for name in perform:
                    values[name] = None
            else:
                guard = True
                if instruction.guard:
                    guard = self.registers.predicate(instruction.guard)
                if perform is None:
                    if warps:
                        self.steps.append((at, warps, number))
                    return self._branch(instruction, at, guard, active)
                if instruction.unit in ("load", "store", "async_copy"):
                    number = self._access(instruction, self._where(guard, active))
                elif instruction.unit == "async_wait":
                    number = int(instruction.operands[-1], 16)
                self._write(perform(instruction, active), guard, active, everyone)
            if warps:
                self.steps.append((at, warps, number))
            at += 1
        return [(at, active)]

    def _perform(self, instruction: Instruction) -> Callable | tuple[str, ...] | None:
        """How to execute it: a function that gives what it writes, or only the names of what
        becomes unknown; None for what ends a straight line.
        """
        operation = instruction.opcode.partition(".")[0]
        if operation in ("BRA", "EXIT") or instruction.unit == "unknown":
            return None
        if operation in ("VOTE", "VOTEU"):
            return self._vote
        if operation in ("LDG", "CCTL", "ATOM", "ATOMG"):
            return getattr(self, f"_{operation.lower()}")
        if operation in SEMANTICS:
            meaning = SEMANTICS[operation]
            return lambda i, _: meaning(self.registers, i.opcode, i.operands)
        if instruction.unit in ("load", "store", "async_copy", "async_wait"):
            return lambda i, _: _unknown(i)
        return tuple(_unknown(instruction))

    def _atomg(self, instruction: Instruction, active: np.ndarray) -> dict[str, Value]:
        self.atomic = True
        return _unknown(instruction)

    _atom = _atomg

    def _cctl(self, instruction: Instruction, active: np.ndarray) -> dict[str, Value]:
        if "IVALL" in instruction.opcode:
            self.cached.clear()
        return {}

    def _where(self, guard: Value, active: np.ndarray) -> np.ndarray:
        return active if guard is None or guard is True else active & guard

    def _branch(
        self, instruction: Instruction, at: int, guard: Value, active: np.ndarray
    ) -> list[tuple[int, np.ndarray]]:
        if instruction.unit == "unknown":
            raise UnknownControlError(f"{instruction.opcode} at {instruction.address:#x}")
        exits = instruction.opcode.startswith("EXIT")
        target = None if exits else self.index[int(instruction.operands[-1], 16)]
        if target == at:  # what follows the last instruction
            return []
        if ".DIV" in instruction.opcode:
            return [(at + 1, active)]
        for operand in instruction.operands[:-1]:
            guard = _and(guard, self.registers.predicate(operand))
        if guard is None:
            if target is not None and target <= at:
                raise UnknownControlError(
                    f"the end of the loop at {instruction.address:#x} is unknown"
                )
            if self.atomic and not self.decision:
                self.decision = len(self.steps)
                following = self.code[at + 1]
                if following.opcode.startswith("EXIT") and not following.guard:
                    return [(target, active)]
            return [(at + 1, active)]
        taken = active & guard
        others = [(at + 1, active & ~taken)]
        return others if target is None else [*others, (target, taken)]

    def _write(
        self, written: Mapping[str, Value], guard: Value, active: np.ndarray, everyone: bool
    ) -> None:
        values = self.registers.values
        for name, value in written.items():
            if name in ("RZ", "URZ", "PT", "UPT"):
                continue
            if guard is not True or not everyone:  # who does not execute it keeps what was there
                old = values.get(name)
                if guard is None or (value is None and old is None):
                    value = None
                elif old is not None or guard is not True:
                    where = active & guard
                    value = _choose(where if where.any() else False, value, old)
            values[name] = value

    def _vote(self, instruction: Instruction, active: np.ndarray) -> dict[str, Value]:
        written, *_, joined = instruction.operands
        predicate = self.registers.predicate(joined)
        names = [x for x in instruction.operands[:-1] if x[-1] != "T"]
        if predicate is None or len(names) != 1 or _is_predicate(written):
            return dict.fromkeys(names)
        votes = (active & predicate).reshape(-1, 32) @ (1 << np.arange(32))
        return {written: np.repeat(votes, 32)}

    # -------------------------------------------------------------- memory

    def _address(self, instruction: Instruction) -> Value:
        """Of the access in global memory."""
        for operand in instruction.operands:
            found = re.fullmatch(r"desc\[UR\d+\]\[(.*)\]", operand)
            if found and not (instruction.unit == "async_copy" and operand[0] != "d"):
                break
        else:
            return None
        total: Value = 0
        for term in re.split(r"\+(?=-?0x|U?R)", found[1]):
            if term.endswith(".64") or term[0] == "U":
                value = self.registers.pair(term.removesuffix(".64"))
            elif term[0] == "R":
                value = self.registers.read(term.removesuffix(".U32"))
            else:
                value = int(term, 16)
            if value is None:
                return None
            total = total + value
        return total

    def _ldg(self, instruction: Instruction, active: np.ndarray) -> dict[str, Value]:
        """Tensors of integers hold 0."""
        written = _unknown(instruction)
        address = self._address(instruction)
        if address is None:
            return written
        tensors = np.unique(np.asarray(address) >> SPACE)
        known = all(0 < t <= len(self.integers) and self.integers[t - 1] for t in tensors)
        return dict.fromkeys(written, 0) if known else written

    def _access(self, instruction: Instruction, where: np.ndarray) -> int:
        """The bytes that each warp moves, from where; the number of the access."""
        row = np.zeros((self.n_warps, 4))
        address = self._address(instruction)
        mine = where[: self.n_threads]
        threads = mine.reshape(self.n_warps, 32).sum(1)
        if "LDL" in instruction.opcode or "STL" in instruction.opcode:
            row[:, 0 if "LDL" in instruction.opcode else 1] = threads * instruction.width
        elif address is None:  # as a gather of what the program has read
            row[:, 1] = np.minimum(threads * instruction.width, 4 * SECTOR)
        else:
            sectors = np.broadcast_to(np.asarray(address) // SECTOR, where.shape)
            self.shared.update(
                np.unique(sectors[self.n_threads :][where[self.n_threads :]]).tolist()
            )
            warp = np.repeat(np.arange(self.n_warps), 32)[mine]
            each = np.unique(sectors[: self.n_threads][mine] | warp << 56)
            if instruction.unit == "store":
                row[:, 2] = threads * instruction.width
                self._touch(each)
            else:
                through_l1 = (
                    "STRONG" not in instruction.opcode and "BYPASS" not in instruction.opcode
                )
                for key in each.tolist():
                    row[key >> 56, self._level(key & (1 << 56) - 1, through_l1)] += SECTOR
        self.traffic.append(row)
        return len(self.traffic) - 1

    def _touch(self, keys: np.ndarray) -> None:
        for key in keys.tolist():
            self.bytes_touched += SECTOR
            self.touched[key & (1 << 56) - 1] = self.bytes_touched

    def _level(self, sector: int, through_l1: bool) -> int:
        """0: L1 has it; 1: L2; 2: DRAM; 3: DRAM, once for all programs."""
        now = self.bytes_touched
        near = now - self.cached.get(sector, -np.inf) <= self.caches.l1
        l2 = self.decision or now - self.touched.get(sector, -np.inf) <= self.caches.l2
        shared = sector in self.shared and sector not in self.touched
        if through_l1 and near:
            self.cached[sector] = now
            return 0
        self.bytes_touched += SECTOR
        self.touched[sector] = self.bytes_touched
        if through_l1:
            self.cached[sector] = self.bytes_touched
        if l2:
            return 1
        return 2 if not shared else 3 if self.caches.shared_is_cold else 1
