"""What the kernels become, cross-compiled for four GPUs: registers, spills, loads.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json

compiles every pair of values that the options of the loss, the shapes, the dtypes and the layouts
can take together (each pair in some call, not every combination), and prints a table. A call that
does not compile is a line with its error, and the exit status is 1.

The record is written after every call, the quick ones first. The same command goes on where an
interrupted one stopped, unless Triton, the kernels or the calls have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import triton
from classroomkd.kernels.launch import blocks
from rich.console import Console
from rich.progress import track
from rich.table import Table

from classroomkd.files import atomic_write

Row = dict[str, object]
KERNELS = Path(__file__).resolve().parent.parent / "kernels"

# Choices that the kernels make only together are one factor, so that they also meet all others:
# what is asked for, how it is reduced and what scales it; which targets, and whether smoothed.
FACTORS: dict[str, tuple[object, ...]] = {
    "call": (
        *(("finished", "mean", None), ("finished", "sum", None)),
        *(("autograd", reduction, None) for reduction in ("mean", "sum", "none")),
        *(("none", reduction, None) for reduction in ("mean", "sum", "none")),
        *(("scaled", "mean", "float32"), ("scaled", "sum", "float16")),
        *(("scaled", "mean", "bfloat16"), ("scaled", "sum", "float64")),
    ),
    "targets": (
        *(("int64", 0.0), ("int64", 0.1), ("int32", 0.0), ("int16", 0.1)),
        *(("int8", 0.0), ("uint8", 0.1), ("float32", 0.0), ("float32", 0.1)),
        *(("bfloat16", 0.0), ("float16", 0.1), ("float64", 0.0)),
    ),
    # A stride of 1, several rows a warp, one, several warps a row; tiles for many mentors, for all.
    "n_classes": (1, 10, 100, 1000, 4096, 9000, 32_768),
    "n_mentors": (1, 2, 6, 16),
    "target": ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"),
    # A constant, ragged, in 16s, so many that they are counted first.
    "n_rows": (1, 500, 512, 2048),
    "knowledge_filter": ("better", "correct", "correct_and_better", "none"),
    "mentoring": ("adaptive", "fixed", "none", "dtkd"),
    "dtype": ("float32", "float16", "bfloat16"),
    "mentor_dtypes": ((), ("float32", "bfloat16", "float16")),
    "row_padding": (0, 5, 2**36),  # the last so far apart that strides take 64 bits
    "mentor_weight": (None, "float32", "bfloat16", "float16", "float64"),
    "ranking": ("sample", "batch"),
    "weighting": ("rank", "uniform"),
    "task_weight": (None, 0.5),
    "rank_decimals": (None, 2),
    "with_report": (False, True),
}


def seconds(row: Row) -> float:
    """About how long a call compiles: where many mentors' rows are in tiles, minutes on AMD."""
    n_classes, n_mentors = row["n_classes"], row["n_mentors"]
    on_amd = row["target"].startswith("hip")
    tiled = blocks(n_classes, n_mentors, 64 if on_amd else 32) is None
    return 1 + n_mentors / 4 + tiled * n_mentors**2 * (1.6 if on_amd else 0.1)


def covering(factors: Mapping[str, Sequence[object]]) -> list[Row]:
    """Rows, one value of each factor, in which every pair of values of two factors occurs.

    Greedy: each row begins with a pair that has not occurred, and takes of one factor after another
    the value that brings many such pairs with what the row has, for little more to compile (the
    square of 1 + pairs over the seconds). The same rows every time, the quick ones first.
    """

    def pairs(name: str, value: object, row: Row) -> Iterator[frozenset[tuple[str, object]]]:
        return (frozenset(((name, value), item)) for item in row.items() if item[0] != name)

    missing = {
        frozenset(((a, x), (b, y))): None  # a set that keeps its order
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    cheapest = {name: values[0] for name, values in factors.items()}

    def worth(name: str, value: object, row: Row) -> float:
        gain = sum(pair in missing for pair in pairs(name, value, row))
        return (1 + gain) ** 2 / seconds(cheapest | row | {name: value})

    rows = []
    while missing:
        row: Row = dict(next(iter(missing)))
        for name, values in factors.items():
            if name not in row:
                row[name] = max(values, key=lambda value: worth(name, value, row))
        for name, value in row.items():
            for pair in pairs(name, value, row):
                missing.pop(pair, None)
        rows.append({name: row[name] for name in factors})
    return sorted(rows, key=seconds)


def arguments_of(row: Row) -> dict[str, object]:
    """A row as the arguments of `compile_call`."""
    import torch

    def dtype(name: object) -> torch.dtype | None:
        return None if name is None else getattr(torch, str(name))

    arguments = {name: row[name] for name in FACTORS if name not in ("call", "targets")}
    arguments["gradient"], arguments["reduction"], scale = row["call"]
    targets, arguments["label_smoothing"] = row["targets"]
    return arguments | {
        "scale": dtype(scale),
        "targets": dtype(targets),
        "dtype": dtype(row["dtype"]),
        "mentor_dtypes": [dtype(name) for name in row["mentor_dtypes"]] or None,
        "mentor_weight": dtype(row["mentor_weight"]),
    }


def compile_row(row: Row) -> Row:
    """A call and its "kernels", by name, or the "error" that it does not compile with."""
    from classroomkd.kernels.ahead_of_time import compile_call

    call = row | {"label_smoothing": row["targets"][1], "targets": row["targets"][0]}
    call |= dict(zip(("gradient", "reduction", "scale"), call.pop("call"), strict=True))
    try:
        kernels = compile_call(**arguments_of(row))
    except Exception as error:  # whatever the compiler raises is what is looked for
        return call | {"error": str(error) or repr(error)}
    return call | {
        "kernels": {
            name: asdict(kernel) | {"blocks": kernel.blocks._asdict()}
            for name, kernel in kernels.items()
        }
    }


def spilled(call: Row) -> int:
    """Bytes a thread that the worst of a call's kernels keeps in memory."""
    return max((kernel["spilled_bytes"] for kernel in call.get("kernels", {}).values()), default=0)


def identity(rows: Sequence[Row]) -> dict[str, object]:
    """What a record must have in common with another to be gone on with."""
    source = hashlib.sha256(json.dumps(rows).encode())
    for file in sorted(KERNELS.glob("*.py")):
        source.update(file.read_bytes())
    return {"triton": triton.__version__, "source": source.hexdigest()[:16], "calls": len(rows)}


def recorded(path: Path, wanted: Mapping[str, object]) -> list[Row]:
    """The calls that the file has already; none if they are of something else, which is told."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = {}
    if all(record.get(key) == value for key, value in wanted.items()):
        return record["compiled"]
    print(f"{path} is of another Triton, other kernels or other calls: started anew")
    return []


def write(path: Path, head: Mapping[str, object], done: Sequence[Row]) -> None:
    """Write the record, a call a line."""
    head = dict(head) | {
        "done": len(done),
        "failed": sum("error" in call for call in done),
        "spilling": sum(spilled(call) > 0 for call in done),
    }
    calls = ",\n".join(map(json.dumps, done))
    atomic_write(path, f'{json.dumps(head)[:-1]}, "compiled": [\n{calls}\n]}}\n')


def compile_rows(rows: Sequence[Row], processes: int) -> Iterator[Row]:
    """`compile_row` of each, in order; an interruption ends the compilers too."""
    with ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    ) as pool:
        try:
            yield from pool.map(compile_row, rows)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def main() -> int:
    """Compile, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()
    rows = covering(FACTORS)
    head = identity(rows)
    done = recorded(arguments.out, head)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    left = compile_rows(rows[len(done) :], arguments.processes)
    try:
        for call in track(left, "compiling", total=len(rows) - len(done)):
            done.append(call)
            write(arguments.out, head, done)
    except KeyboardInterrupt:
        print(f"{len(done)} of {len(rows)} calls are in {arguments.out}; the same command goes on")
        return 130
    Console(width=140).print(table(done))
    return 1 if any("error" in call for call in done) else 0


def table(done: Sequence[Row]) -> Table:
    """A line for each kernel, and for each call that did not compile."""
    heads = ("target", "kernel", "C", "M", "dtype", "warps", "registers", "spilled bytes")
    table = Table(*heads, "shared bytes", "loads (bytes × count)")
    for call in done:
        target, *rest = (str(call[key]) for key in ("target", "n_classes", "n_mentors", "dtype"))
        if "error" in call:
            table.add_row(target, "–", *rest, call["error"])
        for name, kernel in call.get("kernels", {}).items():
            table.add_row(
                *(target, name, *rest, str(kernel["blocks"]["num_warps"])),
                *(str(kernel[key]) for key in ("registers", "spilled_bytes", "shared_bytes")),
                ", ".join(f"{width} × {n}" for width, n in sorted(kernel["loads"].items())),
            )
    return table


if __name__ == "__main__":
    sys.exit(main())
