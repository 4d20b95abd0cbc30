"""What the kernels would take on an H100, from their machine code: modelled, not measured.

    python benchmarks/model.py --out benchmarks/results/modelled/model.json

compiles the loss as its launch would, walks through a program's instructions (``walk.py``), plays
them on the card's multiprocessors (``simulator.py``) and compares with the floor: the larger of the
bytes that must move over the bandwidth and the exponentials over their rate. No GPU is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from classroomkd.files import atomic_write
from classroomkd.kernels.ahead_of_time import call_launches, cubin, described
from classroomkd.kernels.launch import Launch
from sass import UNITS, disassemble
from simulator import Memory, play
from walk import SPACE, Caches, walk

SMS, CLOCK = 132, 1.755e9
REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, 227 * 1024
L1, L2 = 256 * 1024, 50e6
MEMORY = Memory(dram_bytes=13.0, l2_bytes=30.0, dram_latency=800, l2_latency=270)
PORT = 64.0
BANDWIDTH = 3.0e12
EXPONENTIALS = 16 * SMS * CLOCK
LAUNCH, REPLACE, STAGGER = 300, 200, 400
PARAMETERS = 0x210
BUDGET = 12e6
SIMULATED = 8


def occupancy(registers: int, n_warps: int, shared: int) -> int:
    """Programs that fit on a multiprocessor; each quarter of it has a quarter of the registers."""
    warps = 4 * (REGISTERS // 4 // (math.ceil(registers / 8) * 8 * 32))
    return max(1, min(warps // n_warps, WARPS // n_warps, PROGRAMS, SHARED // (shared + 1024)))


def constants_of(launch: Launch) -> tuple[dict[int, int], list[bool]]:
    """Constant bank 0 as the launch fills it, and for each tensor whether it holds integers."""
    grid = [*launch.grid, 1, 1][:3]
    words = {0: 32 * launch.blocks.num_warps, 4: 1, 8: 1, 0x28: 0}
    words |= {0xC + 4 * i: size for i, size in enumerate(grid)}
    integers: list[bool] = []
    offset = PARAMETERS
    for kind, value in _flat(launch):
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


def _flat(launch: Launch) -> Iterator[tuple[str, object]]:
    """Type and value of each argument that the machine code takes."""
    for name, kind in described(launch).items():
        value = launch.arguments[name]
        for one, its in (
            zip(kind, value, strict=True) if isinstance(kind, tuple) else [(kind, value)]
        ):
            if isinstance(one, str):
                yield one.removesuffix(" of 16"), its


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
    latency: (
        float  # what the programs take, each alone with its latencies, side by side as they fit
    )
    moved: float  # bytes between L1 and L2, both ways


def predict(launch: Launch) -> Prediction:
    """What a launch takes on the card, whose L2 cache has none of its tensors."""
    binary, compiled = cubin(launch, "cuda:90")
    code = disassemble(binary)
    n_warps, n_programs = launch.blocks.num_warps, math.prod(launch.grid)
    slots = occupancy(compiled.registers, n_warps, compiled.shared_bytes)
    resident = min(n_programs, SMS * slots)
    of_l1 = max(0, L1 - slots * (compiled.shared_bytes + 1024)) / slots
    caches = Caches(of_l1, L2 / resident, shared_is_cold=n_programs <= SMS * slots)
    walked = walk(code, *constants_of(launch), launch.grid, n_warps, caches)
    unit = {name: i for i, name in enumerate(UNITS)}
    encoded = np.array(
        [(unit[i.unit], i.stall, i.sets, i.reads, i.waits, 32 * i.width) for i in code], np.int64
    )

    def played(path: np.ndarray, n_sms: int, n_programs: int) -> tuple[float, ...]:
        memory = MEMORY if n_sms > 1 else MEMORY._replace(dram_bytes=PORT, l2_bytes=PORT)
        stagger = STAGGER if n_sms > 1 else 0
        given = (n_warps, slots, n_sms, n_programs, LAUNCH, REPLACE, stagger)
        return play(encoded, path, walked.traffic, memory, *given)

    per_sm = n_programs / SMS
    work = len(walked.path) * n_warps
    n_sms = int(np.clip(BUDGET / (work * per_sm), 2, SIMULATED))
    waves = max(4, BUDGET // (work * n_sms * slots))
    if per_sm / slots <= waves:
        cycles, _, _, _, in_flight = played(walked.path, n_sms, max(1, round(per_sm * n_sms)))
    else:  # the first programs, then on at the pace of the later ones
        half, (cycles, _, _, _, in_flight) = (
            played(walked.path, n_sms, round(part * slots * n_sms)) for part in (waves / 2, waves)
        )
        cycles += (cycles - half[0]) / (waves / 2) * (per_sm / slots - waves)
    alone = played(walked.path, 1, 1)[0] - LAUNCH
    tail = played(walked.tail, 1, 1)[0] - LAUNCH if len(walked.tail) else 0.0

    of_unit = np.bincount(encoded[walked.path[:, 0], 0], minlength=len(UNITS))
    bytes_moved = walked.traffic[walked.path[walked.path[:, 2] >= 0, 2]].sum((0, 1))
    microseconds = 1e6 / CLOCK
    return Prediction(
        time=(cycles + tail) * microseconds,
        tail=tail * microseconds,
        registers=compiled.registers,
        spilled_bytes=compiled.spilled_bytes,
        warps=slots * n_warps,
        instructions=len(walked.path),
        in_flight=in_flight,
        memory=bytes_moved[2] * n_programs / BANDWIDTH * 1e6,
        exponentials=of_unit[unit["special"]] * 8 * n_warps * per_sm / 4 * microseconds,
        issue=len(walked.path) * n_warps * per_sm / 4 * microseconds,
        latency=alone * max(1, per_sm / slots) * microseconds,
        moved=bytes_moved[1:].sum() * n_programs,
    )


# B, C; the first two are the small batches, whose floor is far below any launch
SIZES = (
    *((64, 100), (512, 100), (8192, 1000), (8192, 4096)),
    *((4096, 16384), (2048, 32768), (2048, 128256)),
)
MENTORS = (1, 2, 6, 12)
DTYPES = ("float32", "bfloat16")
HEADLINES = (
    *((512, 100, 6, "float32"), (8192, 1000, 6, "float32")),
    *((8192, 1000, 6, "bfloat16"), (2048, 32768, 6, "bfloat16")),
)


def row(n_rows: int, n_classes: int, n_mentors: int, dtype: str, report: bool) -> dict[str, Any]:
    """A case and what is predicted of it, as it stands in the record."""
    launch = call_launches(
        n_classes=n_classes,
        n_mentors=n_mentors,
        n_rows=n_rows,
        dtype=getattr(torch, dtype),
        with_report=report,
    )["classroom"]
    predicted = predict(launch)
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
        **{"rows": n_rows, "classes": n_classes, "mentors": n_mentors, "dtype": dtype},
        **{"report": report, "kernel": launch.kernel.__name__, "sweeps": sweeps},
        **{name: float(f"{value:.4g}") for name, value in predicted._asdict().items()},
        "path_percent": round(100 * floors[1] / predicted.time, 1),
        "one_read_percent": round(100 * floors[0] / predicted.time, 1),
    }


def cases() -> Iterator[tuple[int, int, int, str, bool]]:
    """All that the record has, with reports only for six mentors."""
    for (n_rows, n_classes), n_mentors, dtype in itertools.product(SIZES, MENTORS, DTYPES):
        yield n_rows, n_classes, n_mentors, dtype, False
        if n_mentors == 6:
            yield n_rows, n_classes, n_mentors, dtype, True


def main() -> None:
    """Model, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--classes", type=int, nargs="*", help="only sizes with so many classes")
    parser.add_argument("--mentors", type=int, nargs="*", help="only with so many mentors")
    arguments = parser.parse_args()
    rows = []
    for case in cases():
        wanted = (arguments.classes or [case[1]], arguments.mentors or [case[2]])
        if case[1] in wanted[0] and case[2] in wanted[1]:
            rows.append(row(*case))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        lines = ",\n".join(map(json.dumps, rows))
        atomic_write(
            arguments.out, f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'
        )


if __name__ == "__main__":
    main()
