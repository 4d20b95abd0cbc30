"""Trace the instructions that a program executes and its memory accesses, without its data.

Loop bounds and addresses are integer arithmetic on a launch's arguments and the program and thread
indices. `walk` does that arithmetic (``registers.py``) for all threads of a program at once; values
from memory and floating-point values are unknown, except that integer tensors (targets, counts)
hold 0. Then

- a branch with a known predicate is followed; threads that diverge reconverge at the lowest
  address, as on the hardware;
- a branch with an unknown predicate is not taken: what it would skip is executed, so that all
  mentors are active and all rows valid;
- an instruction with an unknown guard is executed, the later of two with opposite guards last;
- a counter shared by all programs (an atomic without a fence, an integer read past L1) exceeds any
  bound: other programs have taken all slices, and the awaited ones have finished. In the very first
  program, the first such atomic returns 0;
- the first branch on an unknown value after an atomic behind a fence tests whether the program is
  the last to arrive. It is, and what it executes from there on is the tail, which only it executes.

A loop with an unknown end is an error, as is a load of several numbers a thread from an unknown
address, and an instruction that is not modelled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from registers import Registers, Value, and_, choose, following, written
from sass import Instruction

SECTOR = 32  # bytes
SPACE = 36  # bits of address that each tensor has to itself
LIMIT = 5_000_000  # instructions of a warp
_WARP = 56  # a sector's key: its number, and from this bit the warp's
_L1, _L2, _DRAM, _SHARED = range(4)  # columns of the traffic
_NO_TURN = 2**30
_IGNORED = ("RZ", "URZ", "PT", "UPT")


class NotModelledError(Exception):
    """The kernel does something that cannot be traced."""


class Caches(NamedTuple):
    """The bytes that a program may touch before a line that it touched is evicted from L1, L2."""

    l1: float
    l2: float
    shared_is_cold: bool  # whether DRAM's latency also meets what all programs read


class Walked(NamedTuple):
    """The input of `simulator.play` for one program."""

    path: np.ndarray  # int64 [steps, 3]: instruction, bits of the warps that execute it, access
    tail: np.ndarray  # likewise, of the last program; empty if no branch tests for it
    traffic: np.ndarray  # float64 [accesses, warps, 4]: bytes by where they come from
    takes_turns: bool  # whether the first programs do more than the others


def walk(
    code: Sequence[Instruction],
    constants: Mapping[int, int],
    integers: Sequence[bool],
    grid: Sequence[int],
    n_warps: int,
    caches: Caches,
    *,
    first: bool = False,
) -> Walked:
    """Trace the program in the middle of the grid, as if it were the last to arrive.

    Args:
        constants: 32-bit words of constant bank 0, by offset; pointers are tensor << SPACE.
        integers: for each tensor, from 1, whether it holds integers.
        first: whether it is the first to take a slice.

    """
    walker = _Walker(code, constants, integers, grid, n_warps, caches)
    walker.turns = [0] if first else []
    here: dict[int, np.ndarray] = {0: np.ones(2 * 32 * n_warps, bool)}
    while here:  # those behind go on first, so that threads that parted meet
        at = min(here)
        active = here.pop(at)
        for next_at, threads in walker.straight(at, min(here, default=len(code)), active):
            if threads.any():
                here[next_at] = here.get(next_at, False) | threads
        if len(walker.steps) > LIMIT:
            raise NotModelledError(f"no end after {LIMIT:,} instructions")
    path = np.array(walker.steps, np.int64)
    end = walker.decision or len(path)
    traffic = np.array(walker.traffic or [walker.no_bytes()])
    return Walked(path[:end], path[end:], traffic, walker.takes_turns)


class _Walker:
    """Threads of a program and of its neighbour; what both touch is shared by all programs."""

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
        thread = np.tile(np.arange(self.n_threads), 2)
        program = np.repeat([grid[0] // 2, max(0, grid[0] // 2 - 1)], self.n_threads)
        self.registers = Registers(
            constants,
            {"SR_TID.X": thread, "SR_LANEID": thread % 32, "SR_CTAID.X": program}
            | {"SR_LTMASK": (1 << thread % 32) - 1}
            | dict.fromkeys(("SRZ", "SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z"), 0)
            | {"SR_CgaCtaId": 0},
        )
        self.steps: list[tuple[int, int, int]] = []
        self.traffic: list[np.ndarray] = []
        self.touched: dict[int, float] = {}  # sector → bytes touched when it last was
        self.cached: dict[int, float] = {}  # likewise, by loads that go through L1
        self.neighbours: set[int] = set()  # sectors that the neighbour touches
        self.bytes_touched = 0.0
        self.shared: dict[int, Value] = {}  # words of shared memory that one store wrote
        self.packed: dict[str, dict[int, Value]] = {}  # predicates that wait as bits of a register
        self.turns: list[int] = []
        self.takes_turns = self.fenced = self.arrived = False
        self.decision = 0
        self.special = {  # instructions that need more than the registers
            **dict.fromkeys(("VOTE", "VOTEU"), self._vote),
            **dict.fromkeys(("LDL", "STL"), self._spilled),
            **dict.fromkeys(("LDS", "STS"), self._in_shared),
            **dict.fromkeys(("ATOM", "ATOMG", "MEMBAR"), self._atomic),
            **{"LDG": self._loaded, "CCTL": self._invalidate},
        }

    def no_bytes(self) -> np.ndarray:
        """A row of traffic."""
        return np.zeros((self.n_warps, 4))

    def straight(self, at: int, stop: int, active: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Execute until a branch, or until others wait at ``stop``; where threads continue."""
        mine = active[: self.n_threads].reshape(self.n_warps, 32).any(1)
        warps = int(mine @ (1 << np.arange(self.n_warps)))
        everyone = bool(active.all())
        while at < stop:
            instruction = self.code[at]
            operation = instruction.opcode.partition(".")[0]
            guard = self.registers.read(instruction.guard) if instruction.guard else True
            access = -1
            if instruction.unit == "unknown":
                raise NotModelledError(f"{instruction.opcode} at {instruction.address:#x}")
            where = active if guard is None else active & guard
            if instruction.unit in ("load", "store", "async_copy"):
                access = self._access(instruction, where)
            elif instruction.unit == "async_wait":
                access = int(instruction.operands[-1], 16)
            if warps:
                self.steps.append((at, warps, access))
            if operation in ("BRA", "EXIT"):
                return self._branch(instruction, at, guard, active)
            special = self.special.get(operation)
            results = (
                special(instruction, where) if special else self.registers.results(instruction)
            )
            if operation == "LOP3":
                results |= self._packed(instruction, guard, active)
            else:
                for name in results:
                    self.packed.pop(name, None)
            if instruction.unit == "atomic":  # one thread does it for all
                self._write(results, True, active, True)
            else:
                self._write(results, guard, active, everyone)
            at += 1
        return [(at, active)]

    def _branch(
        self, instruction: Instruction, at: int, guard: Value, active: np.ndarray
    ) -> list[tuple[int, np.ndarray]]:
        exits = instruction.opcode.startswith("EXIT")
        target = None if exits else self.index[int(instruction.operands[-1], 16)]
        if target == at:  # what follows the last instruction
            return []
        if ".DIV" in instruction.opcode:
            return [(at + 1, active)]
        for operand in instruction.operands[:-1]:
            guard = and_(guard, self.registers.read(operand))
        if guard is None:
            if target is not None and target < at:
                raise NotModelledError(f"the end of the loop at {instruction.address:#x} is data")
            if self.arrived and not self.decision:
                self.decision = len(self.steps)
                if self.code[at + 1].opcode == "EXIT" and not self.code[at + 1].guard:
                    return [(target, active)]
            return [(at + 1, active)]
        others = [(at + 1, active & ~(active & guard))]
        return others if target is None else [*others, (target, active & guard)]

    def _write(
        self, results: Mapping[str, Value], guard: Value, active: np.ndarray, everyone: bool
    ) -> None:
        """Threads that do not execute it keep their values; unknown ones may be overwritten."""
        values = self.registers.values
        guard = True if guard is None else guard
        for name, value in results.items():
            if name in _IGNORED:
                continue
            if guard is not True or not everyone:
                old = values.get(name)
                if old is not None or guard is not True:
                    where = active & guard
                    value = choose(where, value, old)
            values[name] = value

    # ------------------------------------------------------------------ special instructions

    def _packed(
        self, instruction: Instruction, guard: Value, active: np.ndarray
    ) -> dict[str, Value]:
        """Predicates that are set in and read from a register whose other bits are unknown."""
        *names, source, mask, third, table, _ = instruction.operands
        number = int(mask, 16) if mask[:2] == "0x" and third == "RZ" else 0
        bits = self.packed.setdefault(source, {})
        if names[-1] == source and table == "0xfc" and number.bit_count() == 1:
            before = bits.get(number)
            known = before is not None and guard is not None
            bits[number] = before | (active & guard) if known else None
        elif names[-1] == source and table == "0xc0" and number.bit_count() == 31:
            bits[number ^ 0xFFFFFFFF] = False
        else:
            self.packed.pop(names[-1], None)
            if table == "0xc0" and bits.get(number) is not None and len(names) == 2:
                return {names[0]: bits[number]}
        return {}

    def _vote(self, instruction: Instruction, where: np.ndarray) -> dict[str, Value]:
        names = written(instruction)
        predicate = self.registers.read(instruction.operands[-1])
        if predicate is None or len(names) != 1 or "R" not in names[0]:
            return dict.fromkeys(names)
        votes = (where & predicate).reshape(-1, 32) @ (1 << np.arange(32))
        return {names[0]: np.repeat(votes, 32)}

    def _spilled(self, instruction: Instruction, where: np.ndarray) -> dict[str, Value]:
        """Registers spilled to local memory are restored unchanged."""
        read, count = self.registers.values.get, instruction.width // 4
        if instruction.opcode.startswith("STL"):
            at, source = instruction.operands
            return {f"{at}{i}": read(following(source, i)) for i in range(count)}
        target, at = instruction.operands
        return {following(target, i): read(f"{at}{i}") for i in range(count)}

    def _atomic(self, instruction: Instruction, where: np.ndarray) -> dict[str, Value]:
        names = written(instruction)
        if instruction.unit == "fence":
            self.fenced = True
        elif self.fenced:
            self.fenced, self.arrived = False, True
        elif names:
            self.takes_turns = True
            return self._turn(names, self.turns.pop() if self.turns else _NO_TURN)
        return dict.fromkeys(names)

    def _turn(self, names: Sequence[str], number: int) -> dict[str, Value]:
        """A counter, of which the last register has the highest bits."""
        return dict.fromkeys(names, 0) | {names[-1]: number}

    def _in_shared(self, instruction: Instruction, where: np.ndarray) -> dict[str, Value]:
        """A value common to all threads passes through shared memory; others become unknown."""
        place = next(x for x in instruction.operands if x[0] == "[")
        terms = [self.registers.read(x) for x in place.strip("[]").split("+")]
        known = all(isinstance(x, int) for x in terms)
        words = [sum(terms) + 4 * i for i in range(instruction.width // 4 or 1)] if known else []
        if instruction.opcode.startswith("LDS"):
            names = written(instruction)
            values = [self.shared.get(word) for word in words] or [None] * len(names)
            return dict(zip(names, values, strict=True))
        if not words:
            self.shared.clear()
        for i, word in enumerate(words):
            value = self.registers.read(following(instruction.operands[-1], i))
            if isinstance(value, np.ndarray) and where.any():
                several = np.unique(value[where])
                value = int(several[0]) if len(several) == 1 else None
            self.shared[word] = value
        return {}

    def _invalidate(self, instruction: Instruction, where: np.ndarray) -> dict[str, Value]:
        if "IVALL" in instruction.opcode:
            self.cached.clear()
        return {}

    def _loaded(self, instruction: Instruction, where: np.ndarray) -> dict[str, Value]:
        """Tensors of integers hold 0."""
        address = self._address(instruction)
        if address is None:
            return dict.fromkeys(written(instruction))
        tensors = np.unique(np.broadcast_to(address, where.shape)[where] >> SPACE)
        known = all(0 < t <= len(self.integers) and self.integers[t - 1] for t in tensors)
        if known and "STRONG" in instruction.opcode:  # what other programs write
            return self._turn(written(instruction), _NO_TURN)
        return dict.fromkeys(written(instruction), 0 if known else None)

    # ------------------------------------------------------------------ memory

    def _address(self, instruction: Instruction) -> Value:
        """Of an access to global memory."""
        found = re.search(r"desc\[UR\d+\]\[(.*?)\]", " ".join(instruction.operands))
        total: Value = 0
        for term in re.split(r"\+(?=-?0x|U?R)", found[1]) if found else ():
            if term.endswith(".64") or term[0] == "U":
                value = self.registers.pair(term.removesuffix(".64"))
            else:
                value = self.registers.read(term.removesuffix(".U32"))
                if term[0] == "-":
                    value -= 2**32
            if value is None:
                return None
            total = total + value
        return total if found else None

    def _access(self, instruction: Instruction, where: np.ndarray) -> int:
        """Record the bytes that each warp moves; returns the number of the access."""
        row = self.no_bytes()
        self.traffic.append(row)
        mine = where[: self.n_threads]
        n_bytes = mine.reshape(self.n_warps, 32).sum(1) * instruction.width
        if instruction.opcode.startswith(("LDL", "STL")):
            row[:, _L1] = n_bytes
            return len(self.traffic) - 1
        address = self._address(instruction)
        if address is None:  # a gather from what the program has read
            if instruction.unit == "load" and instruction.width > 4:
                raise NotModelledError(f"the address at {instruction.address:#x} is data")
            row[:, _L2] = np.minimum(n_bytes, 4 * SECTOR)
            return len(self.traffic) - 1
        sectors = np.broadcast_to(np.asarray(address) // SECTOR, where.shape)
        beside = sectors[self.n_threads :][where[self.n_threads :]]
        self.neighbours.update(np.unique(beside).tolist())
        warp = np.repeat(np.arange(self.n_warps), 32)[mine]
        keys = np.unique(sectors[: self.n_threads][mine] | warp << _WARP).tolist()
        if instruction.unit == "store":
            row[:, _DRAM] = n_bytes
            for key in keys:
                self._touch(key & (1 << _WARP) - 1)
            return len(self.traffic) - 1
        through_l1 = not re.search("STRONG|BYPASS", instruction.opcode)
        for key in keys:
            row[key >> _WARP, self._source(key & (1 << _WARP) - 1, through_l1)] += SECTOR
        return len(self.traffic) - 1

    def _touch(self, sector: int) -> None:
        self.bytes_touched += SECTOR
        self.touched[sector] = self.bytes_touched

    def _source(self, sector: int, through_l1: bool) -> int:
        """The column of the traffic: where a sector is read from."""
        since = self.bytes_touched - self.cached.get(sector, -np.inf)
        if through_l1 and since <= self.caches.l1:
            self.cached[sector] = self.bytes_touched
            return _L1
        before = self.touched.get(sector)
        since = self.bytes_touched - (-np.inf if before is None else before)
        self._touch(sector)
        if through_l1:
            self.cached[sector] = self.bytes_touched
        if self.decision or since <= self.caches.l2:
            return _L2
        if before is None and sector in self.neighbours:
            return _SHARED if self.caches.shared_is_cold else _L2
        return _DRAM
