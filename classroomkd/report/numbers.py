"""Format numbers for all pages, and aggregate them over seeds."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, TypeVar

UNKNOWN = "–"

Spread = tuple[float, float | None]
Seed = TypeVar("Seed", bound=Hashable)

_NUMBER = re.compile(r"([+−\d.,±%×* –]|\de-?\d)*( of \d+| s| min| h)?")


def spread(values: Sequence[float | None]) -> Spread | None:
    """``(mean, sample standard deviation)``; the deviation of one value is None.

    The result is None if there are no values or if one of them is None.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return mean(known), stdev(known) if len(known) > 1 else None


def differences(
    own: Mapping[Seed, float | None], others: Mapping[Seed, float | None]
) -> list[float]:
    """Each value of ``own`` minus that of ``others`` with the same key, a run's seed."""
    pairs = ((value, others.get(seed)) for seed, value in own.items())
    return [mine - other for mine, other in pairs if mine is not None and other is not None]


def percent(values: Spread | None, signed: bool = False, unit: str = "") -> str:
    """A `spread` of fractions in percent; ``signed`` for differences."""
    if values is None:
        return UNKNOWN
    middle, deviation = values
    text = format(100 * middle, "+z.2f" if signed else ".2f").replace("-", "−")
    return text + ("" if deviation is None else f" ± {100 * deviation:.2f}") + unit


def counted(number: int, noun: str, ending: str = "s") -> str:
    """The number and the noun, as in "1 epoch" and "2 epochs"."""
    return f"{number:,} {noun}" + ending * (number != 1)


def image_counts(data: Mapping[str, Any]) -> str:
    """The numbers of classes and images in a summary's ``data``."""
    parts = {"training": "train_images", "validation": "validation_images"}
    counts = [f"{data[key]:,} {part}" for part, key in parts.items() if data.get(key)]
    images = f"{', '.join(counts)} and {data['test_images']:,} held-out images"
    return f"{data['classes']:,} classes, {images}"


def filled(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The columns that are not empty in all rows."""
    kept = [
        place
        for place in range(len(columns))
        if not rows or any(row[place] not in ("", UNKNOWN) for row in rows)
    ]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def are_numbers(cells: Sequence[str]) -> bool:
    """Whether all cells are numbers; such columns are right-aligned."""
    return all(map(_NUMBER.fullmatch, cells))


def csv_text(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def duration(seconds: float | None) -> str:
    """A rounded duration."""
    if seconds is None:
        return "unknown until the first epoch is done"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
