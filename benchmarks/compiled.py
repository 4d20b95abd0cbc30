"""Cross-compile the kernels for four GPUs, and record registers, spills and loads.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json

Every pair of values of the options of the loss, the shapes, dtypes and layouts occurs in some call
(not every combination does). A call that fails to compile is recorded with its error, and the exit
status is 1.

The record is written after every call, the quick ones first. The same command resumes an
interrupted one, unless Triton, the kernels or the calls have changed.
"""

from __future__ import annotations

import argparse
import ast
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
from rich.progress import track

from classroomkd.files import atomic_write
from measure import as_json

Row = dict[str, object]
KERNELS = Path(__file__).resolve().parent.parent / "kernels"

# Values that depend on each other form one factor, so that each combination meets all others: the
# call, its reduction and its scale; the targets and their smoothing.
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
    # A stride of 1; several rows per warp; one; several warps per row; tiles for large M; tiles.
    "n_classes": (1, 10, 100, 1000, 4096, 9000, 32_768),
    "n_mentors": (1, 2, 6, 16),
    "target": ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"),
    # A constant; not a multiple of 16; a multiple; large, so that valid rows are counted first.
    "n_rows": (1, 500, 512, 2048),
    "knowledge_filter": ("better", "correct", "correct_and_better", "none"),
    "mentoring": ("adaptive", "fixed", "none", "dtkd"),
    "dtype": ("float32", "float16", "bfloat16"),
    "mentor_dtypes": ((), ("float32", "bfloat16", "float16")),
    "row_padding": (0, 5, 2**36),  # the last needs 64-bit strides
    "n_positions": (None, 256),  # rows, or dense logits in place where there are few classes
    "row_weight": (False, True),
    "mentor_weight": (None, "float32", "bfloat16", "float16", "float64"),
    "ranking": ("sample", "batch"),
    "weighting": ("rank", "uniform", "confidence"),
    "task_weight": (None, 0.5),
    "rank_decimals": (None, 2),
    "with_report": (False, True),
}


def seconds(row: Row) -> float:
    """About how long a call compiles."""
    return 2 + row["n_mentors"] / 2


def covering(factors: Mapping[str, Sequence[object]]) -> list[Row]:
    """Rows with one value of each factor, in which every pair of values of two factors occurs.

    Greedy and deterministic: each row starts with a missing pair. Then each factor in turn gets the
    value that adds many missing pairs at little compilation time, by (1 + pairs)² / seconds. The
    quick rows come first.
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
    """The arguments of `compile_call` for a row."""
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
    """The call with its "kernels" by name, or with the "error" of the compiler."""
    from classroomkd.kernels.ahead_of_time import compile_call

    call = row | {"label_smoothing": row["targets"][1], "targets": row["targets"][0]}
    call |= dict(zip(("gradient", "reduction", "scale"), call.pop("call"), strict=True))
    try:
        kernels = compile_call(**arguments_of(row))
    except Exception as error:  # finding what the compiler raises is the purpose
        return call | {"error": str(error) or repr(error)}
    return call | {
        "kernels": {
            name: asdict(kernel) | {"blocks": kernel.blocks._asdict()}
            for name, kernel in kernels.items()
        }
    }


def spilled(call: Row) -> int:
    """Bytes per thread that the worst kernel of a call spills."""
    return max((kernel["spilled_bytes"] for kernel in call.get("kernels", {}).values()), default=0)


def _statements(file: Path) -> str:
    """A module without comments and docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            del node.body[0]
    return ast.dump(tree)


def identity(rows: Sequence[Row]) -> dict[str, object]:
    """The values that must agree for a record to be resumed."""
    source = hashlib.sha256(json.dumps(rows).encode())
    for file in sorted(KERNELS.glob("*.py")):
        source.update(_statements(file).encode())
    return {"triton": triton.__version__, "source": source.hexdigest()[:16], "calls": len(rows)}


def recorded(path: Path, wanted: Mapping[str, object]) -> list[Row]:
    """The calls that the file contains; none, with a message, if its identity differs."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = {}
    if all(record.get(key) == value for key, value in wanted.items()):
        return record["compiled"]
    print(f"{path} is of another Triton, other kernels or other calls: starting over")
    return []


def write(path: Path, head: Mapping[str, object], done: Sequence[Row]) -> None:
    """Write the record."""
    record = dict(head) | {
        "done": len(done),
        "failed": sum("error" in call for call in done),
        "spilling": sum(spilled(call) > 0 for call in done),
        "compiled": done,
    }
    atomic_write(path, as_json(record))


def compile_rows(rows: Sequence[Row], processes: int) -> Iterator[Row]:
    """`compile_row` of each row, in order; an interruption ends the compilers too."""
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
    """Compile all calls; return 1 if one failed, 130 after Ctrl-C."""
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
        print(f"{len(done)} of {len(rows)} calls are in {arguments.out}; repeat to resume")
        return 130
    failed = [call for call in done if "error" in call]
    for call in failed:
        print(*(call[key] for key in ("target", "n_classes", "n_mentors", "dtype", "error")))
    spilling = sum(spilled(call) > 0 for call in done)
    print(f"{arguments.out}: {len(done)} calls, {len(failed)} failed, {spilling} spill registers")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
