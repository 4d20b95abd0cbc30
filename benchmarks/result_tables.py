"""The benchmarks' results as tables, in the terminal and as Markdown for documents.

    python benchmarks/result_tables.py benchmarks/results/<device>/loss.json > table.md

or any other of the folder that a benchmark wrote; `document.py` puts all of them on one page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from summary import REPORTED

Row = dict[str, Any]

MACHINE = {  # key of an environment, and how its value is said
    "multiprocessors": "{} multiprocessors",
    "memory_gib": "{} GiB",
    "l2_mib": "{} MiB of L2 cache",
    "cpu_threads": "torch's CPU threads: {}",
}
COLUMNS = (  # heading, key, format
    ("device µs", "device_time_us", ".2f"),
    ("timed by", "device_time_by", ""),
    ("host µs", "host_time_us", ".0f"),
    ("GB/s", "gigabytes_per_second", ".4g"),
    ("Gexp/s", "gigaexponentials_per_second", ".4g"),
    ("roofline %", "roofline_percent", ".0f"),
    ("peak MiB", "peak_extra_mib", ".2f"),
    ("loss error", "loss_relative_error", ".0e"),
    ("gradient error", "grad_relative_error", ".0e"),
)
LEGEND = (
    "GB/s, Gexp/s and roofline % count, in every row, what this project's kernels must move and "
    "compute. Device time is that of a CUDA graph's replay with a cold L2 cache; where none can be "
    "captured, the profiler's sum over kernels and copies, without the gaps between them (own "
    "graph: the same, of the graphs that this mode keeps itself, in memory that is not counted); "
    "on the CPU, wall time. Host time is that of the Python call, outside graphs. Errors are "
    "relative, in norm, against float64."
)

KERNEL_COLUMNS = (
    ("graph µs", "graph_us", ".2f"),
    ("profiler µs", "profiler_us", ".2f"),
    ("back to back µs", "back_to_back_us", ".1f"),
    ("host µs", "host_us", ".1f"),
    ("images/s", "images_per_second", ",.0f"),
    ("% of floor", "floor_percent", ".0f"),
)
LOADER_HEADINGS = (
    *("loader", "workers", "images/s", "slowest–fastest round", "% of floor"),
    *("first batch, s", "again, s", "host MiB", "GPU MiB"),
)
LOADER_LEGEND = (
    "Images a second over whole epochs: the median of the rounds, which take turns with those of "
    "all other rows. The first batch is that of a new process, with all that it imports beyond "
    "torch and this library; again is that of a new loader in the same process; * had code to "
    "compile, the others found it compiled, on disk or in memory. Host memory is what the process "
    "and its workers hold in an epoch beyond what it was before the images were loaded, pages of "
    "files not counted; GPU memory, what torch allocated. The floor is a bare copy: on the CPU of "
    "an image's bytes into as many numbers, in memory written over and over; on a GPU of "
    "as many bytes within its memory for the resident loader, and for all others of the finished "
    "numbers from pinned memory."
)

STEP_COLUMNS = (
    ("images/s", "images_per_second", ",.0f"),
    ("× the loop", "times_the_loop", ".1f"),
    ("240 epochs, projected min", "projected_minutes", ",.1f"),
    ("start, s", "start_seconds", ".1f"),
    ("host MiB", "host_mib", ",.0f"),
    ("GPU MiB", "gpu_mib", ",.0f"),
)
LOSS_CPU_LEGEND = (
    "float32, default options, all mentors active. Each time is the least over rounds in which the "
    "implementations take turns: of the process's CPU time with one thread, else of the clock. "
    "Eager and torch.compile have the same plain formulation, and autograd; torch.compile is given "
    "each of the first sizes by itself, the grid with dynamic sizes. A load average beyond the "
    "threads means that others were at work on the machine."
)
STEP_LEGEND = (
    "Images a second over an epoch from its beginning, loader included, or its first seconds: the "
    "median of the rounds, which take turns with those of the other rows. Projected from it: 240 "
    "epochs of 50,000 images, training alone. Start is everything up to and including the first "
    "steps, with all that is compiled. Host memory is what the process and its workers hold at "
    "most until then, beyond what it was before; GPU memory, what torch took. Where the time goes "
    "is from further steps, in ms a step: each part until its last kernel is done, timed by events "
    "in the step's CUDA graph where there is one, on the CPU by the clock; “loader and between” is "
    "all from the end of a step to the beginning of the next. The trainer's loss comes with its "
    "gradient and its report; the loop's gradient of the loss is in its student backward. Its "
    "convolutions are as torch's defaults have them: on a GPU that has it, in TF32."
)


def cells(row: Row) -> list[str]:
    """A row's measurements, or why there are none."""
    if row["status"] != "ok":
        return [row["status"], *[""] * (len(COLUMNS) - 1)]
    return ["–" if row[key] is None else format(row[key], style) for _, key, style in COLUMNS]


def loader_cells(row: Row) -> list[str]:
    """A loader's row, as far as there is one."""
    name = [row["loader"], str(row["workers"] or "–")]
    if row["status"] != "ok":
        return [*name, row["status"], *[""] * (len(LOADER_HEADINGS) - 3)]

    def style(key: str, form: str) -> str:
        return "–" if row[key] is None else format(row[key], form)

    return [
        *name,
        style("images_per_second", ",.0f"),
        f"{min(row['rounds']):,.0f}–{max(row['rounds']):,.0f}",
        style("floor_percent", ".0f" if (row["floor_percent"] or 0) >= 10 else ".1f"),
        *(
            f"{row[key]['seconds']:.2f}{'*' if row[key]['compiled'] else ''}"
            for key in ("first_batch", "first_batch_again")
        ),
        style("host_mib", ".0f"),
        style("gpu_mib", ".0f"),
    ]


def _loader_tables(record: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    """All loaders, then the resident one's kernel where there is a GPU."""
    height, width = record["size"]
    title = (
        f"{record['images']:,} images of {height}×{width}, {record['batch']} a batch, "
        f"{record['dtype']}, {record['device']}"
    )
    found = [(title, list(LOADER_HEADINGS), [loader_cells(row) for row in record["rows"]])]
    if record["kernel"]:
        headings = ["size", *(heading for heading, _, _ in KERNEL_COLUMNS), "status"]
        body = [
            [
                f"{row['size']}×{row['size']}",
                *(
                    "–" if row.get(key) is None else format(row[key], form)
                    for _, key, form in KERNEL_COLUMNS
                ),
                row["status"],
            ]
            for row in record["kernel"]
        ]
        found.append(("The resident loader's kernel, a batch", headings, body))
    return found


def _step_tables(record: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each classroom the rates and where the time goes; then the whole epochs."""
    height, width = record["size"]
    about = f"{record['images']:,} images of {height}×{width}"
    found = []
    for classroom in dict.fromkeys(row["classroom"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["classroom"] == classroom]
        headings = ["batch", "implementation", "loader", "dtype"]
        headings += [heading for heading, _, _ in STEP_COLUMNS]
        headings.insert(5, "slowest–fastest round")
        found.append((f"{classroom}: {about}", headings, [_step_cells(row) for row in rows]))
        timed = [row for row in rows if "parts_status" in row]
        parts = next((list(row["parts_ms"]) for row in timed if "parts_ms" in row), [])
        body = [
            [str(row["batch"]), row["implementation"], *_part_cells(row, len(parts) + 2)]
            for row in timed
        ]
        headings = ["batch", "implementation", *parts, "ms a step", "outside the networks %"]
        found.append((f"{classroom}: where the time goes", headings, body))
    if record["whole"]:
        headings = ["classroom", "batch", "epochs", "min", "of it evaluation", "status"]
        body = [
            [row["classroom"], str(row["batch"]), *_whole_cells(row)] for row in record["whole"]
        ]
        title = f"Whole epochs of the trainer, measured: {about}, and a fifth as many to evaluate"
        found.append((title, headings, body))
    return found


def _step_cells(row: Row) -> list[str]:
    name = [str(row["batch"]), row["implementation"], row.get("loader", ""), row.get("dtype", "")]
    if row["status"] != "ok":
        return [*name, row["status"], *[""] * len(STEP_COLUMNS)]
    values = [
        "–" if row.get(key) is None else format(row[key], form) for _, key, form in STEP_COLUMNS
    ]
    values.insert(1, f"{min(row['rounds']):,.0f}–{max(row['rounds']):,.0f}")
    return name + values


def _part_cells(row: Row, count: int) -> list[str]:
    if row["parts_status"] != "ok":
        return [row["parts_status"], *[""] * (count - 1)]
    times = row["parts_ms"].values()
    return [
        *(f"{milliseconds:.3f}" for milliseconds in (*times, sum(times))),
        f"{row['outside_networks_percent']:.0f}",
    ]


def _whole_cells(row: Row) -> list[str]:
    if not row.get("epochs"):
        return ["0", "–", "–", row["status"]]
    evaluation = row["evaluation_seconds"]
    minutes = [(row["train_seconds"] + evaluation) / 60, evaluation / 60]
    return [str(row["epochs"]), *(f"{value:.2f}" for value in minutes), row["status"]]


def tables(record: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and body of each table of a benchmark's record."""
    by_name = {
        **{"loaders": _loader_tables, "step": _step_tables, "roofline": lambda _: []},
        "loss_cpu": _loss_cpu_tables,
    }
    return by_name.get(record.get("benchmark"), _loss_tables)(record)


def _loss_cpu_tables(record: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each number of threads the sizes in full, and of the grid the gain."""
    found = []
    for threads in dict.fromkeys(row["threads"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["threads"] == threads]
        names = [*rows[0]["microseconds"]]
        for kind, what in (("size", "loss and gradient, ms"), ("grid", "the grid, ms")):
            body = [
                [
                    *(str(row[key]) for key in ("rows", "classes", "mentors")),
                    *(f"{row['microseconds'][name] / 1000:.3f}" for name in names),
                    f"{row['times_faster']:.1f}",
                ]
                for row in rows
                if row["kind"] == kind
            ]
            title = f"{threads} thread{'s' * (threads > 1)}: {what}"
            if body:
                found.append((title, ["B", "C", "M", *names, "× the best of PyTorch"], body))
    return found


def _loss_tables(record: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    """The grid in short, then each named case in full."""
    headings = ["B", "C", "M"]
    grid: dict[tuple, dict[str, str]] = {}
    named: dict[str, list[list[str]]] = {}
    for row in record["rows"]:
        kind = f"{row['dtype']}, {row['ranking']}"
        if row["implementation"] == REPORTED and not row["case"]:
            kind += ", report"
        size = row["rows"], row["classes"], row["mentors"]
        if row["case"]:
            title = "{}: B = {}, C = {}, M = {}, ".format(row["case"], *size) + kind
            named.setdefault(title, []).append([row["implementation"], *cells(row)])
            continue
        if kind not in headings:
            headings.append(kind)
        measured = row["status"] == "ok"
        grid.setdefault(size, {})[kind] = (
            f"{row['device_time_us']:.2f} µs, {row['roofline_percent']:.0f} %"
            if measured
            else row["status"]
        )
    body = [
        [*map(str, size), *(by_kind.get(kind, "") for kind in headings[3:])]
        for size, by_kind in sorted(grid.items(), key=lambda line: (line[0][1], line[0]))
    ]
    full = ["implementation", *(heading for heading, _, _ in COLUMNS)]
    return [
        ("This project: device time and share of the roofline", headings, body),
        *((title, full, rows) for title, rows in named.items()),
    ]


def terminal(record: Row) -> str:
    """In columns of plain text, for a terminal or a log."""
    return "\n\n".join(
        f"{title}\n{columns([headings, *body])}" for title, headings, body in tables(record)
    )


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, each column as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(record: Row) -> str:
    """For a document."""
    from classroomkd.report.markup import markdown_table  # which needs what reports need

    lines = [f"{_machine(record['environment'])} {_limits(record)}".strip()]
    for title, headings, body in tables(record):
        lines += ["", f"**{title}**", "", markdown_table(headings, body)]
    return "\n".join(lines) + "\n"


def _machine(about: Row) -> str:
    """What it was measured on, with which versions, and when."""
    parts = [about["device"]]
    parts += [said.format(about[key]) for key, said in MACHINE.items() if key in about]
    named = {"device", "date", *MACHINE}
    parts += [f"{key} {value}" for key, value in about.items() if value and key not in named]
    return f"{', '.join(parts)}; {about['date']}."


def _limits(record: Row) -> str:
    """What the machine can do at most, as measured, and what the columns are."""
    if record.get("benchmark") == "loaders":
        return f"{floor_lines(record)} {LOADER_LEGEND}"
    if record.get("benchmark") == "step":
        return STEP_LEGEND
    if record.get("benchmark") == "loss_cpu":
        return LOSS_CPU_LEGEND
    ceilings = record["roofline"]
    measured = (
        f"Measured roofline: {ceilings['copy_gigabytes_per_second']:.0f} GB/s copied, "
        f"{ceilings['gigaexponentials_per_second']:.0f} Gexp/s."
    )
    return f"{measured} {LEGEND}" if "rows" in record else measured


def floor_lines(record: Row) -> str:
    """Each floor as bytes an image over the bandwidth measured."""
    return " ".join(
        f"Floor, {name}: {floor['bytes_per_image']:,} bytes an image at "
        f"{floor['gigabytes_per_second']:.1f} GB/s = {floor['images_per_second']:,.0f} images/s."
        for name, floor in record["floors"].items()
    )


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
