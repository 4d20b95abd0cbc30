"""What the kernels become on GPUs that need not be there: registers, spills, loads.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json

compiles, for four targets, the sizes and modes people meet, and prints a table. The first part is
the work on the rows alone (reduction "none", with the gradient), where every global load but the
8-byte target class is of logits; the second is whole launches in several modes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

CLASSES = (10, 100, 1000, 4096, 32_768, 128_256)
MENTORS = (1, 2, 6, 12, 16)
MODES = {
    "loss and gradient": {"finished_grad": True},
    "with report": {"finished_grad": True, "with_report": True},
    "forward only": {"with_grad": False},
    "batch ranking": {"finished_grad": True, "ranking": "batch", "rounded": True},
    "dtkd, correct": {"finished_grad": True, "mentoring": "dtkd", "knowledge_filter": "correct"},
    "probabilities": {"finished_grad": True, "class_probabilities": True},
}


def jobs() -> list[dict[str, object]]:
    """Every compilation of the table."""
    from classroomkd.kernels.ahead_of_time import TARGETS

    rows = {"mode": "rows", "options": {"reduction": "none"}}
    table = [
        rows | {"target": target, "n_classes": c, "n_mentors": m, "dtype": dtype}
        for target, c, m, dtype in itertools.product(TARGETS, CLASSES, MENTORS, ("fp32", "bf16"))
    ]
    return table + [
        {"mode": mode, "options": options, "target": target}
        | {"n_classes": c, "n_mentors": m, "dtype": "fp32"}
        for target, (mode, options), c, m in itertools.product(
            TARGETS, MODES.items(), (100, 1000, 32_768), (6, 16)
        )
    ]


def compile_job(job: dict[str, object]) -> dict[str, object]:
    """One line of the table."""
    from classroomkd.kernels.ahead_of_time import compile_kernel
    from classroomkd.kernels.launch import blocks

    size = {key: job[key] for key in ("target", "n_classes", "n_mentors", "dtype")}
    compiled = asdict(compile_kernel("classroom", **size, **job["options"]))
    warp_size = 32 if job["target"].startswith("cuda") else 64
    compiled["blocks"] = compiled["blocks"]._asdict()
    compiled["tiled"] = blocks(job["n_classes"], job["n_mentors"], warp_size) is None
    return size | {"mode": job["mode"]} | compiled


def main() -> None:
    """Compile, print, write."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()
    work = jobs()
    with ProcessPoolExecutor(arguments.processes) as pool:
        lines = list(track(pool.map(compile_job, work), "compiling", total=len(work)))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    kernels = ",\n".join(map(json.dumps, lines))
    arguments.out.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{kernels}\n]}}\n')

    heads = ("target", "mode", "C", "M", "dtype", "tiled", "warps", "registers", "spilled bytes")
    table = Table(*heads, "shared bytes", "loads (bytes × count)")
    for line in lines:
        table.add_row(
            *(str(line[key]) for key in ("target", "mode", "n_classes", "n_mentors", "dtype")),
            "yes" if line["tiled"] else "",
            *(str(value) for value in (line["blocks"]["num_warps"], line["registers"])),
            *(str(line[key]) for key in ("spilled_bytes", "shared_bytes")),
            ", ".join(f"{width} × {n}" for width, n in sorted(line["loads"].items())),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
