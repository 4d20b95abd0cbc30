"""The results of a finished run as a table, for the report and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from classroomkd.report.numbers import UNKNOWN, filled
from classroomkd.report.records import label

COLUMNS = ("network", "parameters", "epochs", "top-1", "best", "top-5", "loss")


def result_rows(summary: dict) -> list[tuple[str, ...]]:
    """One row of text, with `COLUMNS`, for each of ``summary["results"]``.

    top-1 is that of the last epoch; best is the highest of any epoch, selected on the held-out
    images. With five classes or fewer, top-5 is always 1 and left out.
    """
    few_classes = summary["data"]["classes"] <= 5
    return [
        (
            label(result["phase"], result["name"], summary.get("method", "classroom")),
            _number(result.get("parameters"), ",d"),
            _number(result["epochs"], "d"),
            _number(result.get("top1"), ".2%"),
            _number(result.get("best_test_top1"), ".2%"),
            _number(None if few_classes else result.get("top5"), ".2%"),
            _number(result.get("loss"), ".4f"),
        )
        for result in summary["results"]
    ]


def evidence(summary: dict) -> str:
    """What the results mean: the number of images and the standard error."""
    data, images = summary["data"], summary["data"]["test_images"]
    students = [result for result in summary["results"] if result["phase"] != "mentor"]
    method = summary.get("method", "classroom")
    text = (
        f"Measured on {images:,} held-out images of {data['name']}: "
        f"one image is {100 / images:.2g} percentage points"
    )
    top1 = [result["top1"] for result in summary["results"] if result.get("top1") is not None]
    if top1:
        # The student comes last. At 0 or 1 the formula would give 0, so stay one image away.
        share = min(max(top1[-1], 1 / images), 1 - 1 / images)
        error = 100 * math.sqrt(share * (1 - share) / images)
        text += f", the binomial standard error of a top-1 near {share:.1%} is {error:.2f} points"
    text += ". This is one run with one seed; the variation between seeds is larger."
    if any(result.get("best_test_top1") is not None for result in summary["results"]):
        text += (
            " top-1 is from the last epoch; best is the highest of any epoch on the same images, "
            "which is what papers print."
        )
    calibration = [
        f"{result['calibration_error']:.4f}{label(result['phase'], '', method)}"
        for result in students
        if result.get("calibration_error") is not None
    ]
    if calibration:
        text += f" The student's expected calibration error is {' and '.join(calibration)}."
    chosen = students[-1] if students else {}
    if chosen.get("chosen_epoch") is not None:
        text += (
            f" On the {data['validation_images']:,} validation images, the student of epoch "
            f"{chosen['chosen_epoch']} is best; its top-1 on the held-out images is "
            f"{chosen['chosen_top1']:.2%}."
        )
    return text


def results_table(summary: dict) -> Table:
    """The results of ``summary`` (a run's summary.json) as a table for the terminal."""
    table = terminal_table(*filled(COLUMNS, result_rows(summary)))
    table.caption, table.caption_justify = Text(evidence(summary)), "left"
    table.padding = (0, 1, 0, 0)  # so that lines fit a terminal of 80 characters
    return table


def terminal_table(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> Table:
    """A table whose first ``texts`` columns are aligned left, and all others right."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < texts else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # names may look like rich's markup or emoji codes
    return table


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)
