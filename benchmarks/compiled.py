"""What the kernels become on GPUs that need not be there: registers, spills, loads.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json

compiles, for four targets, every pair of values that the options of the loss, the shapes, the
dtypes and the layouts can take together (each pair in some compilation, not every combination), and
prints a table. A call that does not compile is a line with its error, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

Row = dict[str, object]

# Choices that the kernels make only together are one factor, so that they also meet all others:
# which targets there are, and whether they are smoothed; what is asked for, and how it is reduced.
FACTORS: dict[str, tuple[object, ...]] = {
    "call": tuple(
        (gradient, reduction)
        for gradient in ("none", "autograd", "finished", "scaled")
        for reduction in ("mean", "sum", "none")
        if reduction != "none" or gradient in ("none", "autograd")
    ),
    "targets": (
        *(("int64", 0.0), ("int64", 0.1), ("int32", 0.0), ("uint8", 0.1)),
        *(("float32", 0.0), ("float32", 0.1), ("bfloat16", 0.0), ("float16", 0.1)),
    ),
    # Several rows a warp, one, several warps a row; tiles from where the mentors call for them.
    "n_classes": (10, 100, 1000, 4096, 9000, 32_768),
    "n_mentors": (1, 2, 6, 16),
    "target": ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"),
    "n_rows": (
        1,
        500,
        512,
        2048,
    ),  # a constant, ragged, in 16s, so many that they are counted first
    "knowledge_filter": ("better", "correct", "correct_and_better", "none"),
    "mentoring": ("adaptive", "fixed", "none", "dtkd"),
    "dtype": ("float32", "float16", "bfloat16"),
    "mentor_dtypes": ((), ("float32", "bfloat16", "float16")),
    "row_padding": (0, 5),
    "mentor_weight": (None, "float32", "bfloat16"),
    "ranking": ("sample", "batch"),
    "weighting": ("rank", "uniform"),
    "task_weight": (None, 0.5),
    "rank_decimals": (None, 2),
    "with_report": (False, True),
}


def covering(factors: Mapping[str, Sequence[object]]) -> list[Row]:
    """Rows, one value of each factor, in which every pair of values of two factors occurs.

    Greedy: each row begins with a pair that has not occurred, and takes of one factor after another
    the value that brings most such pairs with what the row has. The same rows every time.
    """

    def pairs(name: str, value: object, row: Row) -> Iterator[frozenset[tuple[str, object]]]:
        return (frozenset(((name, value), item)) for item in row.items() if item[0] != name)

    missing = {
        frozenset(((a, x), (b, y))): None  # a set that keeps its order
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    rows = []
    while missing:
        row: Row = dict(next(iter(missing)))
        for name, values in factors.items():
            if name not in row:
                gains = [sum(p in missing for p in pairs(name, v, row)) for v in values]
                row[name] = values[gains.index(max(gains))]
        for name, value in row.items():
            for pair in pairs(name, value, row):
                missing.pop(pair, None)
        rows.append({name: row[name] for name in factors})
    return rows


def arguments_of(row: Row) -> dict[str, object]:
    """A row as the arguments of `compile_call`."""
    import torch

    def dtype(name: object) -> torch.dtype | None:
        return None if name is None else getattr(torch, str(name))

    arguments = {name: row[name] for name in FACTORS if name not in ("call", "targets")}
    arguments["gradient"], arguments["reduction"] = row["call"]
    targets, arguments["label_smoothing"] = row["targets"]
    return arguments | {
        "targets": dtype(targets),
        "dtype": dtype(row["dtype"]),
        "mentor_dtypes": [dtype(name) for name in row["mentor_dtypes"]] or None,
        "mentor_weight": dtype(row["mentor_weight"]),
    }


def compile_row(row: Row) -> list[dict[str, object]]:
    """The table's lines of a call: one a kernel."""
    from classroomkd.kernels.ahead_of_time import compile_call

    shown = {name: row[name] for name in ("target", "n_classes", "n_mentors", "dtype")}
    rest = {name: value for name, value in row.items() if name not in shown}
    rest["targets"], rest["label_smoothing"] = row["targets"]
    rest["gradient"], rest["reduction"] = rest.pop("call")
    try:
        kernels = compile_call(**arguments_of(row))
    except Exception as error:  # whatever the compiler raises is what is looked for
        return [shown | {"mode": "classroom", "options": rest, "error": str(error) or repr(error)}]
    lines = []
    for name, compiled in kernels.items():
        line = asdict(compiled) | {"blocks": compiled.blocks._asdict()}
        lines.append(shown | {"mode": name, "options": rest} | line)
    return lines


def write(path: Path, n_calls: int, lines: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Write the record, a kernel a line, and return the lines of what failed."""
    import triton

    failed = [line for line in lines if "error" in line]
    kernels = ",\n".join(json.dumps(line) for line in lines if "error" not in line)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{{"triton": "{triton.__version__}", "calls": {n_calls}, "failed": '
        f'{json.dumps(failed)}, "kernels": [\n{kernels}\n]}}\n'
    )
    return failed


def main() -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()
    rows = covering(FACTORS)
    with ProcessPoolExecutor(arguments.processes) as pool:
        done = list(track(pool.map(compile_row, rows), "compiling", total=len(rows)))
    lines = list(itertools.chain.from_iterable(done))
    failed = write(arguments.out, len(rows), lines)

    heads = ("target", "mode", "C", "M", "dtype", "warps", "registers", "spilled bytes")
    table = Table(*heads, "shared bytes", "loads (bytes × count)")
    for line in lines:
        shown = [str(line[key]) for key in ("target", "mode", "n_classes", "n_mentors", "dtype")]
        if line in failed:
            table.add_row(*shown, line["error"])
            continue
        table.add_row(
            *shown,
            *(str(value) for value in (line["blocks"]["num_warps"], line["registers"])),
            *(str(line[key]) for key in ("spilled_bytes", "shared_bytes")),
            ", ".join(f"{width} × {n}" for width, n in sorted(line["loads"].items())),
        )
    Console(width=140).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
