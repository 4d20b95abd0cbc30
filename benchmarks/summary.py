"""Print the headline numbers of a folder of records: ``python benchmarks/summary.py OUT``.

run_gpu.sh ends with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from result_tables import terminal

Record = Mapping[str, Any]
THIS = "fused_classroom_loss_and_grad"
REPORTED = f"{THIS}, report"


def size(row: Record) -> str:
    """The size of a row of the loss benchmark."""
    return "B {rows}, C {classes}, M {mentors}, {dtype}".format(**row)


def is_cifar(row: Record) -> bool:
    """Whether a row has the size of CIFAR-100 training, where all implementations are measured."""
    return (row["classes"], row["mentors"]) == (100, 6) and 64 <= row["rows"] <= 512


def is_headline(row: Record) -> bool:
    """Whether a row of the loss benchmark is a headline: CIFAR sizes and large ones, by sample."""
    return row["ranking"] == "sample" and (is_cifar(row) or row["rows"] * row["classes"] >= 2**22)


def on_gpu(record: Record) -> bool:
    """Whether a record was measured on a GPU."""
    return "multiprocessors" in record.get("environment", {})


def _loss(record: Record) -> Iterator[str]:
    rows = [row for row in record["rows"] if is_headline(row)]
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["status"] != "ok":
            yield f"{size(row)}, {row['implementation']}: {row['status']}"
            continue
        if row["device_time_us"] is not None:
            of_size = times.setdefault((row["case"], size(row)), {})
            of_size[row["implementation"]] = row["device_time_us"]
            if row["implementation"] == THIS and row.get("roofline_percent") is not None:
                of_size["percent"] = row["roofline_percent"]
    for (case, where), found in times.items():
        if THIS not in found:
            continue
        text = f"{where}: {found[THIS]:.2f} µs"
        if REPORTED in found:
            text += f" ({found[REPORTED]:.2f} with the report)"
        if "percent" in found:
            text += f", {found['percent']:.0f} % of the roofline"
        compiled = [time for name, time in found.items() if name.startswith("compile")]
        others = {"eager": found.get("eager"), "best torch.compile": min(compiled, default=None)}
        for name, time in others.items():
            text += f", {time / found[THIS]:.1f}× {name}" if time else ""
        yield text + (f" [{case}]" if case else "")


def main() -> None:
    """Print the headline numbers of the loss and the tables of the other records in a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that benchmarks wrote")
    out = parser.parse_args().out
    for name in ("loss", "loss_linear", "loaders", "step"):
        if (path := out / f"{name}.json").exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            for line in _loss(record) if name == "loss" else terminal(record).splitlines():
                print(f"{name:11} {line[:150]}")


if __name__ == "__main__":
    main()
