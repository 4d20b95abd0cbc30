"""All threads of a grid, in lockstep: each instruction on arrays of all their registers.

Programs are dealt into a few groups at random, and a group that is chosen at random goes on until
it has done something that others can see. Threads that took different branches wait for each other
where their ways meet: those with the smallest program counter always go first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from tests.ptx.arithmetic import BITS, TYPES, Perturbation, comparison, extremum_of, operation
from tests.ptx.memory import Actors, Array, Global, Shared
from tests.ptx.parse import (
    WIDTH,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Pair,
    PtxError,
    Register,
    Symbol,
    UnknownInstructionError,
    Vector,
)

WARP = 32
ALL_LANES = 0xFFFFFFFF
SHARED_MEMORY = "global_smem"  # Triton's name of it
_UNSET = 0xDEAD  # what registers hold before they are written

Step = Callable[["Group", Array], None]
"""Executes an instruction for the threads of a mask or, of the lane-wise kinds, of a list."""


@dataclass(frozen=True)
class Compiled:
    """An instruction made ready: ``kind`` says how the group calls ``step``."""

    kind: str
    """"masked", "lanes", "visible" (lanes, and others may see it), "branch", "barrier", "exit"."""
    step: Step
    guard: int | None
    negated: bool
    target: int = -1


@dataclass
class Counts:
    """What was executed, by instruction: arrays [instructions]."""

    warps: Array
    """Warps that executed it."""
    requests: Array
    """Warps of which a thread at least asked memory."""
    bytes: Array
    """That their threads asked for."""
    sectors: Array
    """32-byte sectors of global memory, each warp by itself."""
    wavefronts: Array
    """Passes through shared memory, bank conflicts included."""

    @classmethod
    def zero(cls, n: int) -> Counts:
        """None of n instructions was executed."""
        return cls(*(np.zeros(n, np.int64) for _ in fields(cls)))


class Program:
    """A kernel's instructions as functions of a `Group`, for any number of launches."""

    def __init__(self, kernel: Kernel, perturb: Perturbation | None = None) -> None:
        self.kernel, self.perturb = kernel, perturb
        self.slots: dict[str, int] = {}
        self.unset: list[Array] = []
        self.constants: dict[int, Array] = {}
        self.parameters = {name: i for i, name in enumerate(kernel.parameters)}
        # Where each begins in the space of parameters, all of them on multiples of 8 bytes.
        self.places = [8 * i for i in range(len(kernel.parameters))]
        if not kernel.code or kernel.code[-1].opcode != ("ret",):
            raise PtxError(f"{kernel.name} does not end with ret")
        self.steps = [self._compiled(at, each) for at, each in enumerate(kernel.code)]

    def _compiled(self, at: int, instruction: Instruction) -> Compiled:
        name = instruction.opcode[0]
        build = getattr(self, f"_{name}", None) or self._arithmetic
        try:
            kind, step = build(at, instruction.opcode, instruction.operands)
            target = -1
            if name == "bra":
                (label,) = instruction.operands
                assert isinstance(label, Symbol)
                target = self.kernel.labels[label.name]
        except (UnknownInstructionError, ValueError, KeyError, AssertionError, IndexError) as error:
            raise UnknownInstructionError(f"{instruction}: {error}") from error
        guard = None if instruction.guard is None else self._slot(instruction.guard, 0)
        if guard is not None and kind in ("barrier", "exit"):
            raise UnknownInstructionError(f"{instruction}: a guard")
        return Compiled(kind, step, guard, instruction.negated, target)

    # --- operands

    def _slot(self, operand: Operand, width: int | None = None) -> int:
        """The place of a register, or of a constant of this width, among a group's registers."""
        if isinstance(operand, Register):
            if width is not None and operand.width != width:
                raise UnknownInstructionError(f"{operand.name} as {width} bytes")
            return self._place(operand.name, operand.width)
        if isinstance(operand, Immediate) and width is not None:
            return self._constant(f"{operand.text}:{width}", operand.bits(width), width)
        if isinstance(operand, Symbol) and operand.name == SHARED_MEMORY and width is not None:
            return self._constant(f"{operand.name}:{width}", 0, width)
        if isinstance(operand, Symbol) and operand.name in self.parameters and width == 8:
            at = self.places[self.parameters[operand.name]]
            return self._constant(operand.name, at, width)
        if isinstance(operand, Symbol) and operand.name in SPECIAL and width == 4:
            return self._place(operand.name, width)
        raise UnknownInstructionError(f"operand {operand}")

    def _constant(self, name: str, value: int, width: int) -> int:
        slot = self._place(name, width)
        self.constants[slot] = np.array([value], BITS[width])
        return slot

    def _place(self, name: str, width: int) -> int:
        if name not in self.slots:
            self.slots[name] = len(self.slots)
            self.unset.append(np.array([_UNSET]).astype(BITS[width]))
        return self.slots[name]

    def _address(self, operand: Operand, width: int) -> Callable[[Group], Array]:
        """The addresses [threads] or [1] that an operand names."""
        assert isinstance(operand, Address)
        base, bits = self._slot(operand.base, width), BITS[width]
        offset = np.array(operand.offset & (256**width - 1)).astype(bits)
        if not offset:
            return lambda group: group.registers[base]
        return lambda group: group.registers[base] + offset

    @staticmethod
    def _several(operand: Operand, n: int) -> list[Operand]:
        items = list(operand.items) if isinstance(operand, Vector) else [operand]
        if len(items) != n:
            raise UnknownInstructionError(f"{len(items)} operands for {n} values")
        return items

    # --- control

    def _bra(self, _at: int, opcode: tuple[str, ...], _operands: object) -> tuple[str, Step]:
        assert opcode in (("bra",), ("bra", "uni")), "form"
        return "branch", lambda *_: None

    def _ret(self, _at: int, opcode: tuple[str, ...], _operands: object) -> tuple[str, Step]:
        assert opcode == ("ret",), "form"
        return "exit", lambda *_: None

    def _bar(
        self, _at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        (which,) = operands
        assert isinstance(which, Immediate)
        if opcode == ("bar", "warp", "sync") and which.bits(4) == ALL_LANES:
            return "masked", lambda group, mask: group.warp_barrier(mask)
        assert opcode == ("bar", "sync") and which.bits(4) == 0, "form"  # noqa: PT018
        return "barrier", lambda group, mask: group.barrier(mask)

    # --- registers

    def _arithmetic(
        self, _at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        destination, *sources = operands
        computed = operation(opcode, len(sources), self.perturb)
        assert isinstance(destination, Register)
        if len(sources) != len(computed.sources):
            raise UnknownInstructionError(f"{len(sources)} source operands")
        function = computed.function
        slots = []
        for source, width in zip(sources, computed.sources, strict=True):
            if opcode[0] == "cvt" and isinstance(source, Register) and source.width > width:
                slots.append(self._slot(source))
                function = _after(lambda bits, t=BITS[width]: bits.astype(t), function)
            else:
                slots.append(self._slot(source, width))
        if destination.width != computed.result:
            if opcode[0] != "cvt" or destination.width < computed.result:
                raise UnknownInstructionError(f"result in {destination.width} bytes")
            function = _widened(function, computed.result, destination.width, computed.signed)
        to = self._slot(destination)

        def step(group: Group, mask: Array) -> None:
            registers = group.registers
            group.put(to, function(*[registers[slot] for slot in slots]), mask)

        return "masked", step

    def _mov(
        self, at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        """Also the two ways between one register and a vector of its parts."""
        destination, source = operands
        if isinstance(destination, Vector):
            whole = self._slot(source, WIDTH[opcode[1]])
            part = WIDTH[opcode[1]] // len(destination.items)
            parts = [
                (k, self._slot(each, part))
                for k, each in enumerate(destination.items)
                if each != Symbol("_")
            ]

            def unpack(group: Group, mask: Array) -> None:
                value = group.registers[whole]
                for k, slot in parts:
                    shifted = value >> value.dtype.type(8 * part * k)
                    group.put(slot, shifted.astype(BITS[part]), mask)

            return "masked", unpack
        if isinstance(source, Vector):
            width = WIDTH[opcode[1]]
            part, whole = width // len(source.items), self._slot(destination, width)
            slots = [self._slot(each, part) for each in source.items]

            def pack(group: Group, mask: Array) -> None:
                value = BITS[width](0)
                for k, slot in enumerate(slots):
                    value = value | group.registers[slot].astype(BITS[width]) << BITS[width](
                        8 * part * k
                    )
                group.put(whole, value, mask)

            return "masked", pack
        return self._arithmetic(at, opcode, operands)

    def _setp(
        self, _at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        """setp.compare[.and|or|xor][.ftz].type p[|q], a, b[, c].

        q is the opposite; of packed halves, p is of the lower and q of the upper ones.
        """
        destination, left, right, *third = operands
        name, kind, rest = opcode[1], opcode[-1], set(opcode[2:-1])
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        combined = [join[each] for each in rest & {*join}]
        if rest - {"ftz", *join} or len(combined) != len(third):
            raise UnknownInstructionError("form")
        packed = kind.endswith("x2")
        compare = comparison(name, kind.removesuffix("x2"), "ftz" in rest)
        a, b = (self._slot(each, WIDTH[kind]) for each in (left, right))
        with_ = [self._slot(each, 0) for each in third]
        pair = isinstance(destination, Pair)
        if packed and not pair:
            raise UnknownInstructionError("one destination of two comparisons")
        results = [
            None if each == Symbol("_") else self._slot(each, 0)
            for each in (destination.items if isinstance(destination, Pair) else [destination])
        ]

        def step(group: Group, mask: Array) -> None:
            x, y = group.registers[a], group.registers[b]
            if packed:
                halves = [[(z >> np.uint32(n)).astype(np.uint16) for z in (x, y)] for n in (0, 16)]
                values = [compare(*each) for each in halves]
            else:
                first = compare(x, y)
                values = [first, ~first]
            for slot, value in zip(results, values, strict=False):
                if slot is not None:
                    for function, other in zip(combined, with_, strict=True):
                        value = function(value, group.registers[other])
                    group.put(slot, value, mask)

        return "masked", step

    def _shfl(
        self, _at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        """Each lane's value from another; out of the segment from itself."""
        assert opcode[:2] == ("shfl", "sync"), "form"
        assert opcode[3:] == ("b32",), "form"
        mode = opcode[2]
        destination, second = operands[0], None
        if isinstance(destination, Pair):
            second = self._slot(destination.items[1], 0)
            destination = destination.items[0]
        to, *sources = (self._slot(each, 4) for each in (destination, *operands[1:]))
        value, distance, clamp, members = sources
        lane = np.arange(WARP)
        sources_of: dict[str, Callable[[Array, Array], Array]] = {
            "bfly": lambda by, _: lane ^ by,
            "idx": lambda by, segment: (lane & segment) | (by & ~segment),
            "up": lambda by, _: lane - by,
            "down": lambda by, _: lane + by,
        }
        source_of = sources_of[mode]

        def step(group: Group, mask: Array) -> None:
            group.whole_warps(mask, group.registers[members])
            registers = (group.registers[each] for each in (value, distance, clamp))
            values, by, limit = (group.spread(each).reshape(-1, WARP) for each in registers)
            by, limit = by.astype(np.int64) & 31, limit.astype(np.int64)
            segment, high = limit >> 8 & 31, limit & 31
            last = (lane & segment) | (high & ~segment)
            source = source_of(by, segment)
            good = source >= last if mode == "up" else source <= last
            source = np.where(good, source, lane)
            group.put(to, np.take_along_axis(values, source, 1).reshape(-1), mask)
            if second is not None:
                group.put(second, good.reshape(-1), mask)

        return "masked", step

    def _redux(
        self, _at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        """One result of all lanes of a warp."""
        _, sync, name, *modifiers, kind = opcode
        assert sync == "sync", "form"
        assert not modifiers or (modifiers == ["NaN"] and kind == "f32"), "form"
        dtype = TYPES[kind]
        functions: dict[str, Callable[[Array, Array], Array]] = {
            **{"add": np.add, "min": np.minimum, "max": np.maximum},
            **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
        }
        function = functions[name]
        if kind == "f32":
            assert name in ("min", "max"), "type"
            function = extremum_of(name == "max", bool(modifiers))
        to, value, members = (self._slot(each, 4) for each in operands)

        def step(group: Group, mask: Array) -> None:
            group.whole_warps(mask, group.registers[members])
            values = group.spread(group.registers[value]).view(dtype).reshape(-1, WARP)
            while (half := values.shape[1] // 2) > 0:
                values = function(values[:, :half], values[:, half:])
            group.put(to, np.repeat(values.reshape(-1), WARP).view(np.uint32), mask)

        return "masked", step

    # --- memory

    def _ld(
        self, at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        destination, source = operands
        kind = opcode[-1]
        if opcode[1] == "param":
            return self._parameter(opcode, destination, source)
        if "relaxed" in opcode:  # an atomic operation that changes nothing
            same = ("atom", *opcode[1:-1], "read", opcode[-1])
            return self._atom(at, same, (destination, source, Immediate("0")))
        space, count = _memory_form(opcode)
        width = WIDTH[kind]
        items = self._several(destination, count)
        to = [(self._slot(each), BITS[each.width]) for each in items if isinstance(each, Register)]
        assert len(to) == count
        address = self._address(source, 8 if space == "global" else 4)

        def step(group: Group, lanes: Array) -> None:
            values = group.load(space, at, lanes, address(group), width, count)
            for (slot, bits), value in zip(to, values, strict=True):
                group.put_lanes(slot, _extended(value, bits, kind[0] == "s"), lanes)

        return "lanes", step

    def _parameter(
        self, opcode: tuple[str, ...], destination: Operand, source: Operand
    ) -> tuple[str, Step]:
        assert isinstance(destination, Register)
        assert isinstance(source, Address)
        if isinstance(source.base, Register):  # one of several, chosen by its address
            return self._chosen_parameter(opcode, destination, source)
        assert isinstance(source.base, Symbol)
        assert len(opcode) == 3, "form"
        assert not source.offset, "offset"
        index, to = self.parameters[source.base.name], self._slot(destination)
        width, kind = WIDTH[opcode[-1]], opcode[-1]

        def step(group: Group, mask: Array) -> None:
            value = np.frombuffer(group.launch.parameters[index].tobytes()[:width], BITS[width])
            group.put(to, _extended(value, BITS[destination.width], kind[0] == "s"), mask)

        return "masked", step

    def _chosen_parameter(
        self, opcode: tuple[str, ...], destination: Register, source: Address
    ) -> tuple[str, Step]:
        to, address = self._slot(destination), self._address(source, 8)
        width, kind = WIDTH[opcode[-1]], opcode[-1]

        def step(group: Group, mask: Array) -> None:
            places = address(group)
            assert not (places % 8).any(), "into a parameter"
            values = [
                np.frombuffer(each.tobytes()[:width].ljust(width, b"\0"), BITS[width])[0]
                for each in group.launch.parameters
            ]
            chosen = np.array(values, BITS[width])[(places // 8).astype(np.int64)]
            group.put(to, _extended(chosen, BITS[destination.width], kind[0] == "s"), mask)

        return "masked", step

    def _st(
        self, at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        place, source = operands
        space, count = _memory_form(opcode)
        width = WIDTH[opcode[-1]]
        slots = [
            self._slot(each, None if isinstance(each, Register) else width)
            for each in self._several(source, count)
        ]
        address = self._address(place, 8 if space == "global" else 4)

        def step(group: Group, lanes: Array) -> None:
            values = [group.spread(group.registers[each])[lanes] for each in slots]
            values = [value.astype(BITS[width], copy=False) for value in values]
            group.store(space, at, lanes, address(group), width, values)

        return "visible" if space == "global" else "lanes", step

    def _atom(
        self, at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        kind, modifiers = opcode[-1], set(opcode[1:-1])
        order = modifiers & {"relaxed", "acq_rel"}
        (name,) = modifiers - order - {"global", "gpu"}
        functions: dict[str, Callable[[Array, Array], Array]] = {
            **{"add": np.add, "min": np.minimum, "max": np.maximum},
            **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
            "exch": lambda _, new: new,
            "read": lambda old, _: old,
        }
        function, dtype = functions[name], TYPES[kind]
        assert "global" in modifiers and len(order) == 1, "form"  # noqa: PT018
        width = WIDTH[kind]
        to, value = self._slot(operands[0], width), self._slot(operands[2], width)
        address = self._address(operands[1], 8)

        def step(group: Group, lanes: Array) -> None:
            launch = group.launch
            where = group.spread(address(group))[lanes]
            group.count(at, lanes, where, width, "global")
            values = group.spread(group.registers[value])[lanes].view(dtype)
            before = launch.memory.atomic(
                *(group.actors(at, lanes), where, function, values),
                *("acq_rel" in order, launch.rng),
            )
            group.put_lanes(to, before.view(BITS[width]), lanes)

        return "visible", step

    def _ldmatrix(
        self, at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        return self._matrix(at, opcode, operands[0], operands[1])

    def _stmatrix(
        self, at: int, opcode: tuple[str, ...], operands: tuple[Operand, ...]
    ) -> tuple[str, Step]:
        return self._matrix(at, opcode, operands[1], operands[0])

    def _matrix(
        self, at: int, opcode: tuple[str, ...], values: Operand, place: Operand
    ) -> tuple[str, Step]:
        """8×8 matrices of 16-bit numbers, by the addresses of rows of 16 bytes.

        Lanes 8k … 8k + 7 name the rows of matrix k; lane l has word l mod 4 of row l div 4 of each,
        or transposed number l div 4 of rows 2 (l mod 4) and the next.
        """
        assert opcode[1:4] == ("sync", "aligned", "m8n8"), "form"
        assert opcode[-1] == "b16", "type"
        assert {"shared"} <= set(opcode[5:-1]) <= {"trans", "shared", "::cta"}, "form"
        count = {"x1": 1, "x2": 2, "x4": 4}[opcode[4]]
        slots = [self._slot(each, 4) for each in self._several(values, count)]
        address = self._address(place, 4)
        lane = np.arange(WARP)
        width, parts = 4, [(lane // 4, 4 * (lane % 4))]
        if "trans" in opcode:
            assert opcode[0] == "ldmatrix", "form"
            width, parts = 2, [(2 * (lane % 4) + half, 2 * (lane // 4)) for half in (0, 1)]

        def step(group: Group, mask: Array) -> None:
            group.whole_warps(mask, np.array([ALL_LANES], np.uint32))
            lanes = np.flatnonzero(mask)
            rows = group.spread(address(group)).reshape(-1, WARP)
            for k, slot in enumerate(slots):
                words = []
                for part, (row, offset) in enumerate(parts):
                    begin = rows[:, 8 * k + row]
                    if (begin.reshape(-1)[lanes] % 16).any():
                        raise group.launch.findings.fatal(
                            "misaligned access of 16 bytes", at, "a row"
                        )
                    mine = (begin + offset.astype(np.uint32)).reshape(-1)
                    if opcode[0] == "stmatrix":
                        value = group.spread(group.registers[slot])[lanes]
                        group.store("shared", at, lanes, mine, 4, [value])
                    else:
                        (value,) = group.load("shared", at, lanes, mine, width, 1)
                        words.append(value.astype(np.uint32) << np.uint32(16 * part))
                if words:
                    group.put_lanes(slot, np.bitwise_or.reduce(words), lanes)

        return "masked", step


def _after(first: Callable[[Array], Array], then: Callable[..., Array]) -> Callable[..., Array]:
    return lambda bits: then(first(bits))


def _extended(value: Array, bits: type, signed: bool) -> Array:
    """Bits in a wider register, by zeros or by copies of the sign."""
    if value.dtype == bits:
        return value
    if signed:
        return value.view(f"i{value.itemsize}").astype(f"i{bits().itemsize}").view(bits)
    return value.astype(bits)


def _widened(
    function: Callable[..., Array], width: int, to: int, signed: bool
) -> Callable[..., Array]:
    return lambda *sources: _extended(function(*sources).view(BITS[width]), BITS[to], signed)


# Hints to the caches, which change no value.
_CACHES = {"ca", "cg", "cs", "cv", "wb", "wt", "lu"}
_SPACES = {"global", "shared", "::cta"}


def _memory_form(opcode: tuple[str, ...]) -> tuple[str, int]:
    """A load's or store's space, global or shared, and its number of values."""
    vectors = {each for each in opcode[1:-1] if each in ("v1", "v2", "v4", "v8")}
    if unknown := set(opcode[1:-1]) - vectors - _CACHES - _SPACES:
        raise UnknownInstructionError(f"modifier {', '.join(sorted(unknown))}")
    (space,) = {"global", "shared"} & {*opcode}
    return space, int(max(vectors, default="v1")[1:])


class Launch:
    """One grid that runs to its end."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, ...],
        parameters: list[np.generic],
        memory: Global,
        shared_size: int,
        rng: np.random.Generator,
    ) -> None:
        self.program, self.parameters = program, parameters
        self.grid = (*grid, 1, 1)[:3]
        self.n_threads, self.shared_size, self.rng = program.kernel.n_threads, shared_size, rng
        self.memory, self.order, self.findings = memory, memory.order, memory.findings
        self.counts = Counts.zero(len(program.steps))

    def run(self) -> None:
        """Execute all programs. Raises PtxError where one cannot go on."""
        n_programs = math.prod(self.grid)
        n_groups = int(self.rng.integers(1, min(3, n_programs) + 1))
        dealt = self.rng.permutation(n_programs)
        cuts = self.rng.choice(np.arange(1, n_programs), n_groups - 1, replace=False)
        groups = [Group(self, each).run() for each in np.split(dealt, np.sort(cuts))]
        with np.errstate(all="ignore"):
            while groups:
                chosen = int(self.rng.integers(len(groups)))
                for _ in range(int(self.rng.integers(1, 40))):
                    if next(groups[chosen], False) is False:
                        groups.pop(chosen)
                        break


def _special(grid: tuple[int, ...], program: Array, thread: Array, n: int) -> dict[str, Array]:
    zero = np.zeros(1, np.uint32)
    x, y, z = grid
    return {
        **{"%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%laneid": thread % WARP},
        **{"%ntid.x": zero + n, "%ntid.y": zero + 1, "%ntid.z": zero + 1},
        **{"%ctaid.x": program % x, "%ctaid.y": program // x % y, "%ctaid.z": program // (x * y)},
        **{"%nctaid.x": zero + x, "%nctaid.y": zero + y, "%nctaid.z": zero + z},
    }


SPECIAL = frozenset(_special((1, 1, 1), np.zeros(1), np.zeros(1), 1))


class Group:
    """Programs that run in lockstep: their threads' registers, shared memory and masks."""

    def __init__(self, launch: Launch, programs: Array) -> None:
        self.launch, self.programs = launch, programs
        n_threads = launch.n_threads
        self.n = len(programs) * n_threads
        self.registers = [*launch.program.unset]
        for slot, value in launch.program.constants.items():
            self.registers[slot] = value
        self._place = np.repeat(np.arange(len(programs)), n_threads)
        inside = np.tile(np.arange(n_threads), len(programs))
        program = programs[self._place]
        for name, value in _special(launch.grid, program, inside, n_threads).items():
            if name in launch.program.slots:
                self.registers[launch.program.slots[name]] = value.astype(np.uint32)
        self._thread = (program * n_threads + inside).astype(np.int32)
        self.shared = Shared(len(programs), launch.shared_size, n_threads, launch.findings)
        self._warp_epoch = np.zeros(self.n // WARP, np.int32)
        self._live = np.ones(self.n, bool)
        self._all = True  # whether the threads that execute an instruction are all that live
        self._at = 0

    def spread(self, value: Array) -> Array:
        """A register as [threads], also where it holds the same number for all."""
        return value if len(value) == self.n else np.broadcast_to(value, self.n)

    def put(self, slot: int, value: Array, mask: Array) -> None:
        """Write a register of the threads in a mask."""
        if not self._all:
            value = np.where(mask, value, self.registers[slot])
        self.registers[slot] = value

    def put_lanes(self, slot: int, value: Array, lanes: Array) -> None:
        """Write a register of the threads in a list."""
        if len(lanes) < self.n:
            result = np.empty(self.n, value.dtype)
            result[:] = self.registers[slot]
            result[lanes] = value
            value = result
        self.registers[slot] = value

    # --- control

    def run(self) -> Iterator[None]:
        """Execute the kernel; it yields where other programs could see a difference."""
        launch = self.launch
        steps, executed = launch.program.steps, launch.counts.warps
        waiting: dict[int, Array] = {}  # masks, by the instruction at which they go on

        def wait(at: int, mask: Array) -> None:
            waiting[at] = waiting[at] | mask if at in waiting else mask

        wait(0, self._live)
        while waiting:
            at = min(waiting)
            mask = waiting.pop(at)
            meeting = min(waiting, default=len(steps))
            everybody = bool((mask == self._live).all())
            n_warps = int(mask.reshape(-1, WARP).any(1).sum())
            while at < meeting:
                self._at, step = at, steps[at]
                executed[at] += n_warps
                chosen = mask
                if step.guard is not None:
                    guard = self.registers[step.guard]
                    chosen = mask & (~guard if step.negated else guard)
                self._all = everybody and step.guard is None
                at += 1
                if step.kind == "masked":
                    self._execute(step, chosen)
                elif step.kind in ("lanes", "visible"):
                    lanes = np.flatnonzero(chosen)
                    if len(lanes):
                        self._execute(step, lanes)
                        if step.kind == "visible":
                            yield
                elif step.kind == "barrier":
                    self._execute(step, mask)
                    yield
                elif step.kind == "exit":
                    self._live = self._live & ~mask
                    break
                elif chosen.any():  # a branch that somebody takes
                    other = mask & ~chosen
                    if not other.any() and step.target < meeting:
                        at = step.target
                        continue
                    wait(step.target, chosen)
                    if other.any():
                        wait(at, other)
                    break
            else:
                wait(at, mask)

    def _execute(self, step: Compiled, which: Array) -> None:
        try:
            step.step(self, which)
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            instruction = self.launch.program.kernel.code[self._at]
            raise PtxError(f"{instruction}: {error}") from error

    def whole_warps(self, mask: Array, members: Array) -> None:
        """What a warp does together needs all lanes that its mask of members names."""
        if ((members != ALL_LANES) & mask).any():
            raise self._fatal("warp-wide instruction", "not all lanes are to take part")
        if not self._all:
            n = mask.reshape(-1, WARP).sum(1)
            if ((n != 0) & (n != WARP)).any():
                raise self._fatal("warp-wide instruction", "not all lanes are here")

    def warp_barrier(self, mask: Array) -> None:
        """Orders the shared memory that the lanes of a warp access."""
        self.whole_warps(mask, np.array([ALL_LANES], np.uint32))
        self._warp_epoch += mask.reshape(-1, WARP).any(1)

    def barrier(self, mask: Array) -> None:
        """Orders the memory that the threads of a program access; all of them must come."""
        here, live = (each.reshape(-1, self.launch.n_threads).sum(1) for each in (mask, self._live))
        if ((here != 0) & (here != live)).any():
            raise self._fatal("divergent barrier", f"{here[here > 0][0]} threads came")
        self.launch.order.epoch[self.programs[here > 0]] += 1
        self._warp_epoch += mask.reshape(-1, WARP).any(1)

    def _fatal(self, kind: str, detail: str) -> PtxError:
        return self.launch.findings.fatal(kind, self._at, detail)

    # --- memory

    def actors(self, at: int, lanes: Array) -> Actors:
        """The threads in a list, now."""
        place = self._place[lanes]
        epoch = self.launch.order.epoch[self.programs[place]]
        return Actors(at, self._thread[lanes], epoch, self._warp_epoch[lanes // WARP], place)

    def load(
        self, space: str, at: int, lanes: Array, address: Array, width: int, count: int
    ) -> list[Array]:
        """Values of ``width`` bytes for each thread in a list."""
        where = self.spread(address)[lanes]
        self.count(at, lanes, where, width * count, space)
        memory = self.launch.memory if space == "global" else self.shared
        return memory.load(self.actors(at, lanes), where, width, count)

    def store(
        self, space: str, at: int, lanes: Array, address: Array, width: int, values: list[Array]
    ) -> None:
        """Likewise."""
        where = self.spread(address)[lanes]
        self.count(at, lanes, where, width * len(values), space)
        memory = self.launch.memory if space == "global" else self.shared
        memory.store(self.actors(at, lanes), where, width, values)

    def count(self, at: int, lanes: Array, where: Array, total: int, space: str) -> None:
        """Count an access of so many bytes a thread."""
        counts = self.launch.counts
        counts.bytes[at] += len(lanes) * total
        if space == "global":
            requests, sectors = self.launch.memory.requests(self._thread[lanes], where, total)
            counts.requests[at] += requests
            counts.sectors[at] += sectors
        else:
            counts.requests[at] += len(np.unique(lanes // WARP))
            counts.wavefronts[at] += self.shared.wavefronts(lanes // WARP, where, total)
