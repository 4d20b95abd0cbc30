"""Collect the results of all finished runs of a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from classroomkd.errors import UserError
from classroomkd.files import atomic_write
from classroomkd.report.seeds import aggregate
from classroomkd.reproduce.plan import run_values
from classroomkd.reproduce.status import own_records
from classroomkd.runs.identity import difference


def collect(table: str, out: Path, order: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for each finished run of ``table`` in its folder ``out``.

    Rows follow ``order``, a list of task ids; other runs come after them. ``last``, ``best`` and
    ``chosen`` are top-1 on the held-out images, as fractions: after the last epoch, the highest of
    any epoch, and that of the epoch that is best on the validation images (None without any).
    ``validation_last`` is top-1 on these, after the last epoch.

    Raises UserError if runs that should differ only in the seed differ in more.
    """
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path in sorted((out / "runs").rglob("seed*/summary.json")):
        folder = path.parent
        *parts, variant, _ = folder.relative_to(out / "runs").parts
        row = "/".join(parts)
        summary, values = _read(path), run_values(folder)
        other, expected = first.setdefault((row, variant), (folder, values))
        if differing := difference(expected, values):
            raise UserError(
                f"{other} has {differing} in {folder}: such runs cannot be averaged; move one of "
                "them away"
            )
        rows.append(_row(table, row, variant, folder, summary, values))
    places = {"/".join(run.split("/")[1:-1]): place for place, run in enumerate(reversed(order))}

    def place(row: Mapping[str, Any]) -> tuple[int, str, int]:
        name = f"{row['classroom']}/{row['variant']}"
        return -places.get(name, -1), name, row["seed"]

    return sorted(rows, key=place)


def _row(
    table: str,
    classroom: str,
    variant: str,
    folder: Path,
    summary: Mapping[str, Any],
    values: Mapping[str, Any],
) -> dict[str, Any]:
    mentors = [result for result in summary["results"] if result["phase"] == "mentor"]
    # The student alone, if any, comes before the student with mentors.
    *_, student = (result for result in summary["results"] if result["phase"] != "mentor")
    data, records = summary["data"], own_records(folder, mentors=False)
    return {
        "table": table,
        "classroom": classroom,
        "variant": variant,
        "method": summary["method"],
        "student": student["name"],
        "mentors": " ".join(mentor["source"] for mentor in values["mentors"]),
        "seed": summary["seed"],
        "epochs": student["epochs"],
        "mentor_epochs": values["mentor_training"]["epochs"],
        "data": data["name"],
        "cifar100": _is_cifar100(data),
        "classes": data["classes"],
        "train_images": data["train_images"],
        "validation_images": data.get("validation_images", 0),
        "test_images": data["test_images"],
        "test_digest": _read(folder / "inputs.json").get("the test images"),
        "last": student["top1"],
        "best": student["best_test_top1"],
        "chosen": student.get("chosen_top1"),
        "validation_last": records[-1].get("validation_top1"),
        "teacher_last": mentors[0]["top1"] if mentors else None,
        "mentors_last": " ".join(f"{mentor['name']}={mentor['top1']:.4f}" for mentor in mentors),
        "seconds": sum(line["seconds"] for line in records),
        "device": summary["device"],
        **summary["versions"],
    }


def _is_cifar100(data: Mapping[str, Any]) -> bool:
    """Whether the data is all of CIFAR-100, judging by classes and counts."""
    counts = (data["train_images"] + data.get("validation_images", 0), data["test_images"])
    names = {name.replace(" ", "_") for name in data["class_names"]}
    known = {"aquarium_fish", "lawn_mower", "willow_tree", "worm"}
    return len(names) == 100 and known <= names and counts == (50_000, 10_000)


def write_results(table: str, out: Path, order: Sequence[str] = ()) -> dict[str, Any]:
    """Write results.json and results.csv for the finished runs in ``out``; returns the former."""
    rows = collect(table, out, order)
    results = {"table": table, "groups": aggregate(rows), "runs": rows}
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    atomic_write(out / "results.csv", text.getvalue())
    atomic_write(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}: remove its folder and run again") from None
