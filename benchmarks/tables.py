"""The loss benchmark's results as tables, in the terminal and as Markdown for documents.

python benchmarks/tables.py benchmarks/results/<device>/loss.json > table.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]

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


def cells(row: Row) -> list[str]:
    """A row's measurements, or why there are none."""
    if row["status"] != "ok":
        return [row["status"], *[""] * (len(COLUMNS) - 1)]
    return ["–" if row[key] is None else format(row[key], style) for _, key, style in COLUMNS]


def tables(record: Row) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and body: the grid in short, then each named case in full."""
    headings = ["B", "C", "M"]
    grid: dict[tuple, dict[str, str]] = {}
    named: dict[str, list[list[str]]] = {}
    for row in record["rows"]:
        kind = f"{row['dtype']}, {row['ranking']}"
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
        for size, by_kind in grid.items()
    ]
    full = ["implementation", *(heading for heading, _, _ in COLUMNS)]
    return [
        ("This project: device time and share of the roofline", headings, body),
        *((title, full, rows) for title, rows in named.items()),
    ]


def terminal(record: Row) -> list[Table]:
    """For a rich console."""
    drawn = []
    for title, headings, body in tables(record):
        drawn.append(Table(*headings, title=title, title_justify="left"))
        for line in body:
            drawn[-1].add_row(*line)
    return drawn


def markdown(record: Row) -> str:
    """For a document."""
    about, ceilings = record["environment"], record["roofline"]
    lines = [
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['date']}. "
        f"Measured roofline: {ceilings['copy_gigabytes_per_second']:.0f} GB/s copied, "
        f"{ceilings['gigaexponentials_per_second']:.0f} Gexp/s. {LEGEND}"
    ]
    for title, headings, body in tables(record):
        lines += ["", f"**{title}**", ""]
        lines += [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *body)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
