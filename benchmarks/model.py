"""The kernels' time on an H100, modelled from their machine code, not measured.

    python benchmarks/model.py --out benchmarks/results/modelled/model.json

compiles the loss as its launch would, traces a program's instructions (``walk.py``), simulates them
on the card's multiprocessors (``simulator.py``) and compares the time with a lower bound: the
larger of bytes over bandwidth and exponentials over their rate. No GPU is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import compiled
import known_kernels
from classroomkd.files import atomic_write
from classroomkd.kernels.ahead_of_time import MachineCode, machine_code
from classroomkd.kernels.meta_calls import call_launches
from measure import as_json
from modelled import CASE
from sass import UNITS, disassemble
from simulator import COSTS, Memory, play
from walk import SPACE, Caches, Walked, walk

TARGET = "cuda:90"
SMS, CLOCK = 132, 1.755e9
REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, 227 * 1024  # of a multiprocessor
L1, L2 = 256 * 1024, 50e6  # bytes, the first with the shared memory
MEMORY = Memory(dram_bytes=13.0, l2_bytes=30.0, dram_latency=800, l2_latency=270)
PORT = 64.0  # bytes a cycle that one multiprocessor may take from L2
BANDWIDTH, EXPONENTIALS = 3.0e12, 16 * SMS * CLOCK  # the floor's
LAUNCH, REPLACE, STAGGER = 300, 200, 400  # cycles
PARAMETERS = 0x210  # where constant bank 0 has the arguments
SIMULATED, STEPS = 8, 12e6  # multiprocessors, and about how many instructions are played

_GUIDE = "[CUDA C++ Programming Guide](https://docs.nvidia.com/cuda/cuda-c-programming-guide/)"
_DAO = f"[Guo, Zadouri, Dao 2025]({known_kernels.SOURCE})"
ASSUMPTIONS = (  # what, how much, from where
    ("multiprocessors, clock", f"{SMS}, {CLOCK / 1e9} GHz", "NVIDIA's H100 white paper"),
    (
        "a multiprocessor's registers, warps, programs, shared memory",
        f"{REGISTERS}, {WARPS}, {PROGRAMS}, {SHARED // 1024} KiB",
        f"{_GUIDE}, technical specifications",
    ),
    ("registers are those of one of four schedulers", "a quarter", "CUDA's cuda_occupancy.h"),
    (
        "a multiprocessor's results a cycle: float32 add, multiply; compare, select, integer, "
        "logic; exponential, logarithm, reciprocal; shuffle",
        ", ".join(
            f"{lanes * 32 // COSTS[unit][0]}"
            for unit, lanes in (("fma", 4), ("alu", 4), ("special", 4), ("shuffle", 2))
        ),
        f"{_GUIDE}, throughput of arithmetic instructions",
    ),
    (
        "bytes from DRAM",
        f"{BANDWIDTH / 1e12} TB/s ({MEMORY.dram_bytes:g} a cycle and multiprocessor)",
        f"3.01 TB/s reached of 3.35, {_DAO}",
    ),
    (
        "latency of DRAM, under load",
        f"{MEMORY.dram_latency:g} cycles",
        f"about 400 ns without load, {_DAO}; the rest is assumed",
    ),
    (
        "latency of L2, bytes from L2",
        f"{MEMORY.l2_latency:g} cycles, {MEMORY.l2_bytes:g} a cycle and multiprocessor",
        f"150–200 ns, 5–10 TB/s, {_DAO}",
    ),
    (
        "what L1 and L2 keep",
        f"{L1 // 1024} KiB less shared memory, {L2 / 1e6:g} MB, shared among resident programs; "
        "least recently used leaves",
        "sizes from NVIDIA's H100 white paper; the rest is assumed",
    ),
    (
        "cycles until the result: L1, shared memory, shuffle, special function, atomic, fence, "
        "barrier",
        ", ".join(
            f"{COSTS[unit][1]}"
            for unit in ("load", "shared", "shuffle", "special", "atomic", "fence", "barrier")
        ),
        "assumed, of the size of published microbenchmarks",
    ),
    (
        "cycles until the launch's first instruction, and the next program's",
        f"{LAUNCH}, {REPLACE}",
        "assumed",
    ),
    ("all other latencies", "stall counts and scoreboards", "the machine code"),
    (
        "left out",
        "instruction cache, bank conflicts, spills that leave L1, address translation, a clock "
        "that falls with power, the launch before the first instruction",
        "",
    ),
)


def occupancy(registers: int, n_warps: int, shared: int) -> int:
    """Programs that fit on a multiprocessor; each quarter of it has a quarter of the registers."""
    warps = 4 * (REGISTERS // 4 // (math.ceil(registers / 8) * 8 * 32))
    return max(1, min(warps // n_warps, WARPS // n_warps, PROGRAMS, SHARED // (shared + 1024)))


def constants_of(code: MachineCode) -> tuple[dict[int, int], list[bool]]:
    """Constant bank 0 as the launch fills it, and for each tensor whether it holds integers."""
    words = {0: 32 * code.num_warps, 4: 1, 8: 1, 0x28: 0}
    words |= {0xC + 4 * i: size for i, size in enumerate([*code.grid, 1, 1][:3])}
    integers: list[bool] = []
    offset = PARAMETERS
    for kind, value in code.arguments:
        size = 8 if kind[0] == "*" or kind == "i64" else 4
        offset = -(-offset // size) * size
        if kind[0] == "*":
            integers.append(not value.is_floating_point())
            value = (len(integers) << SPACE) + value.storage_offset() * value.element_size()
        elif kind == "fp32":
            value = int(np.float32(value).view(np.uint32))
        for i in range(size // 4):
            words[offset + 4 * i] = value >> 32 * i & 2**32 - 1
        offset += size
    return words, integers


class Prediction(NamedTuple):
    """Of one launch; all times in µs."""

    time: float  # in all
    tail: float  # of which after the last program has arrived
    registers: int
    spilled_bytes: int
    warps: int  # resident on a multiprocessor
    instructions: int  # of a warp
    in_flight: float  # bytes on their way to a multiprocessor, on average
    memory: float  # what the bytes from and to DRAM take
    exponentials: float  # what the special function units take
    issue: float  # what issuing takes
    latency: float  # what the programs take if each takes as long as alone on the card
    moved: float  # bytes between L1 and L2, both ways, but for what all programs read


def predict(kernel: MachineCode, memory: Memory = MEMORY) -> Prediction:
    """The time of a launch on the card, with none of its tensors in the L2 cache."""
    code = disassemble(kernel.cubin)
    n_warps, n_programs = kernel.num_warps, math.prod(kernel.grid)
    slots = occupancy(kernel.registers, n_warps, kernel.shared_bytes)
    resident = min(n_programs, SMS * slots)
    of_l1 = max(0, L1 - slots * (kernel.shared_bytes + 1024)) / slots
    caches = Caches(of_l1, L2 / resident, shared_is_cold=n_programs <= SMS * slots)
    given = (code, *constants_of(kernel), kernel.grid, n_warps, caches)
    walked = walk(*given)
    unit = {name: i for i, name in enumerate(UNITS)}
    encoded = np.array(
        [(unit[i.unit], i.stall, i.sets, i.reads, i.waits, 32 * i.width) for i in code], np.int64
    )

    def played(walked: Walked, n_sms: int, n_programs: int) -> tuple[float, ...]:
        alone = memory._replace(dram_bytes=PORT, l2_bytes=PORT)  # on the card
        of, stagger = (alone, 0) if n_sms == 1 else (memory, STAGGER)
        card = (n_warps, slots, n_sms, n_programs, LAUNCH, REPLACE, stagger)
        return play(encoded, walked.path, walked.traffic, of, *card)

    per_sm = n_programs / SMS
    work = len(walked.path) * n_warps
    n_sms = int(np.clip(STEPS / (work * per_sm), 2, SIMULATED))
    waves = max(4, STEPS // (work * n_sms * slots))
    if per_sm / slots <= waves:
        cycles, in_flight = played(walked, n_sms, max(1, round(per_sm * n_sms)))
    else:  # the first programs, then extrapolated at the rate of the later ones
        half, (cycles, in_flight) = (
            played(walked, n_sms, round(part * slots * n_sms)) for part in (waves / 2, waves)
        )
        cycles += (cycles - half[0]) / (waves / 2) * (per_sm / slots - waves)
    alone = played(walked, 1, 1)[0] - LAUNCH
    if walked.takes_turns:  # the first programs have more to do
        cycles = max(cycles, played(walk(*given, first=True), 1, 1)[0])
    tail = 0.0
    if len(walked.tail):
        tail = played(walked._replace(path=walked.tail), 1, 1)[0] - LAUNCH

    of_unit = np.bincount(encoded[walked.path[:, 0], 0], minlength=len(UNITS))
    bytes_moved = walked.traffic[walked.path[walked.path[:, 2] >= 0, 2]].sum((0, 1))
    microseconds = 1e6 / CLOCK
    return Prediction(
        time=(cycles + tail) * microseconds,
        tail=tail * microseconds,
        registers=kernel.registers,
        spilled_bytes=kernel.spilled_bytes,
        warps=slots * n_warps,
        instructions=len(walked.path),
        in_flight=in_flight,
        memory=bytes_moved[2] * n_programs / BANDWIDTH * 1e6,
        exponentials=of_unit[unit["special"]] * 8 * n_warps * per_sm / 4 * microseconds,
        issue=len(walked.path) * n_warps * per_sm / 4 * microseconds,
        latency=alone * max(1, per_sm / slots) * microseconds,
        moved=(bytes_moved[1] + bytes_moved[2]) * n_programs,
    )


# B, C; the first two are small batches, whose floor is far below any launch; two have odd rows
SIZES = (
    *((64, 100), (512, 100), (8192, 1000), (8192, 1001), (8192, 4096)),
    *((4096, 16384), (2048, 32768), (2048, 50257), (2048, 128256)),
)
MENTORS = (1, 2, 6, 12)
DTYPES = ("float32", "bfloat16")
HEADLINES = (  # that may not become slower unseen
    *((512, 100, 6, "float32", True), (8192, 1000, 6, "float32", False)),
    *((8192, 1000, 6, "bfloat16", False), (2048, 32768, 6, "bfloat16", False)),
)


def row(
    n_rows: int,
    n_classes: int,
    n_mentors: int,
    dtype: str,
    report: bool = False,
    memory: Memory = MEMORY,
) -> dict[str, Any]:
    """A case and its prediction, as a row of the record."""
    launch = call_launches(
        n_classes=n_classes,
        n_mentors=n_mentors,
        n_rows=n_rows,
        dtype=getattr(torch, dtype),
        with_report=report,
    )["classroom"]
    code = machine_code(launch, TARGET)
    predicted = predict(code, memory)
    numbers = n_rows * n_classes
    size = getattr(torch, dtype).itemsize
    sweeps = round((predicted.moved / numbers / size - 1) / (n_mentors + 1))
    floors = [
        max(
            (n * (n_mentors + 1) + 1) * numbers * size / BANDWIDTH,
            (1 + 3 * n_mentors) * numbers / EXPONENTIALS,
        )
        * 1e6
        for n in (1, sweeps)
    ]
    return {
        **dict(zip(CASE, (n_rows, n_classes, n_mentors, dtype, report), strict=True)),
        **{"kernel": code.name, "sweeps": sweeps},
        **{name: float(f"{value:.4g}") for name, value in predicted._asdict().items()},
        "path_percent": round(100 * floors[1] / predicted.time, 1),
        "one_read_percent": round(100 * floors[0] / predicted.time, 1),
    }


def cases() -> Iterator[tuple[int, int, int, str, bool]]:
    """All cases of the record, with reports only for six mentors."""
    for (n_rows, n_classes), n_mentors, dtype in itertools.product(SIZES, MENTORS, DTYPES):
        yield n_rows, n_classes, n_mentors, dtype, False
        if n_mentors == 6:
            yield n_rows, n_classes, n_mentors, dtype, True


def compared(known: known_kernels.Known) -> dict[str, Any]:
    """A kernel with a published speed, and its modelled speed."""
    predicted = predict(known.code(TARGET))
    return {
        **{"kernel": known.kernel.__name__, "rows": known_kernels.ROWS},
        **{"classes": known.n_classes, "dtype": str(known.dtype).removeprefix("torch.")},
        "modelled": round(known.bytes_needed / predicted.time / 1e6, 2),
        **{"published": known.published, "of": known.of},
    }


def slower(rows: Sequence[Mapping[str, Any]], recorded: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows that take more than 5 % longer than in the record."""
    before = {tuple(old[key] for key in CASE): old["time"] for old in recorded}
    return [
        f"{new['rows']} × {new['classes']}, {new['mentors']} mentors, {new['dtype']}: "
        f"{new['time']} µs, recorded {before[tuple(new[key] for key in CASE)]}"
        for new in rows
        if new["time"] > 1.05 * before[tuple(new[key] for key in CASE)]
    ]


def main() -> None:
    """Model, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write; what it has of these kernels")
    parser.add_argument("--classes", type=int, nargs="*", help="only sizes with so many classes")
    parser.add_argument("--mentors", type=int, nargs="*", help="only with so many mentors")
    arguments = parser.parse_args()
    wanted = [
        case
        for case in cases()
        if case[1] in (arguments.classes or [case[1]])
        and case[2] in (arguments.mentors or [case[2]])
    ]
    record = {"assumptions": ASSUMPTIONS, "compared": [], "sensitivity": [], "rows": []}
    record |= compiled.identity(list(cases()))
    if arguments.out and arguments.out.exists():
        record |= _kept(json.loads(arguments.out.read_text(encoding="utf-8")), record)

    def note(part: str, entry: dict[str, Any]) -> None:
        print(json.dumps(entry), flush=True)
        record[part].append(entry)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(arguments.out, as_json(record))

    done = [tuple(old[key] for key in CASE) for old in record["rows"]]
    if wanted == list(cases()):
        for case in HEADLINES[len(record["sensitivity"]) :]:
            times = {
                f"dram_latency_{cycles}": row(*case, MEMORY._replace(dram_latency=cycles))["time"]
                for cycles in (500, 1200)
            }
            note("sensitivity", dict(zip(CASE, case, strict=True)) | times)
        for known in list(known_kernels.known())[len(record["compared"]) :]:
            note("compared", compared(known))
    for case in sorted(wanted, key=HEADLINES.__contains__, reverse=True):
        if case not in done:
            note("rows", row(*case))


def _kept(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The rows of an interrupted run with the same kernels and assumptions."""
    same = ("triton", "source", "assumptions")
    old["assumptions"] = tuple(map(tuple, old.get("assumptions", ())))
    if all(old.get(key) == new[key] for key in same):
        return {part: old[part] for part in ("rows", "sensitivity", "compared")}
    return {}


if __name__ == "__main__":
    main()
