"""What the report's figures share: colours, curves and vertical axes. Nothing here draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log10
from typing import Any

from classroomkd.report.numbers import spread

# Okabe and Ito's palette for colour-blind readers, without yellow, which is invisible on white, and
# two dark colours from Tol's. Markers differ too; 8 colours and 7 markers give 56 distinct pairs.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    *("#e69f00", "#56b4e9", "#882255", "#332288"),
)
ALONE = "#767676"  # the student alone, in every plot
INK = "#111111"  # text, and the student with mentors
FRAME, GRID = "#999999", "#e5e5e5"
MARKERS = ("o", "s", "D", "^", "P", "X", "v")

# What a page in a dark scheme draws in place of each colour.
DARK = dict(zip(COLOURS, COLOURS, strict=True)) | {
    "#0072b2": "#3391cf",
    "#882255": "#e0457b",
    "#332288": "#8c7bea",
    ALONE: "#a0a0a0",
    INK: "#eeeeee",
    FRAME: "#777777",
    GRID: "#3a3a3a",
}


def themed(colour: str) -> str:
    """The CSS of a colour, which a dark scheme may replace."""
    return f"var(--{colour[1:]})" if colour in DARK else colour


@dataclass(frozen=True)
class Curve:
    """Values over epochs, with a band of ± ``deviations`` if there are any.

    ``line`` has properties of matplotlib's Line2D: color, and linewidth or linestyle.
    """

    name: str
    epochs: Sequence[int]
    values: Sequence[float | None]
    deviations: Sequence[float | None]
    line: Mapping[str, Any]
    marker: str


@dataclass(frozen=True)
class Axis:
    """A vertical axis.

    ``ticks`` maps values to labels, and ``place`` a value to its position on the axis; both have
    defaults. ``limits`` are the lower and the upper end, each of which may follow from the data.
    ``tip`` formats a value in words.
    """

    title: str
    limits: tuple[float | None, float | None] = (None, None)
    log: bool = False
    percent: bool = False
    ticks: Mapping[float, str] = field(default_factory=dict)
    place: Callable[[float], float] = float
    tip: str = ".4g"


def curve(
    runs: Sequence[Sequence[dict]],
    value: Callable[[dict], float | None],
    name: str,
    line: Mapping[str, Any],
    marker: str = "o",
) -> Curve:
    """``value`` over the epochs of a run's records.

    For several runs: their mean and sample standard deviation, over the epochs that all have.
    """
    values = [{record["epoch"]: value(record) for record in records} for records in runs]
    epochs = [epoch for epoch in values[0] if all(epoch in of_run for of_run in values)]
    found = [spread([of_run[epoch] for of_run in values]) for epoch in epochs]
    middle, deviations = ([both and both[part] for both in found] for part in (0, 1))
    return Curve(name, epochs, middle, deviations if len(runs) > 1 else [], line, marker)


def accuracy_axis(title: str, *plots: Sequence[Curve]) -> Axis:
    """An axis for the accuracies of all ``plots``, labelled in percent.

    It is logarithmic in the error, so that curves near 100 % can be distinguished. A perfect
    accuracy is drawn at half of the smallest error.
    """
    curves = [curve for plot in plots for curve in plot]
    tops = [y for curve in curves for y in curve.values if y is not None]
    tops += [
        y + side * d
        for curve in curves
        for y, d in zip(curve.values, curve.deviations, strict=False)  # of one run there are none
        if y is not None and d is not None
        for side in (-1, 1)
    ]
    least = min((1 - y for y in tops if 1 - y > 1e-9), default=0.01) / 2
    drawn = [max(1 - y, least) for y in tops]
    low, high = min(drawn, default=least), max(drawn, default=1)
    ticks = {tick: f"{100 - 100 * tick:.6g}" for tick in _error_ticks(low, high)}
    if least in drawn:
        ticks[least] = "100"
    margin = (high / low) ** 0.04 * 1.02
    return Axis(
        title,
        (high * margin, low / margin),
        log=True,
        ticks=ticks,
        place=lambda top: max(1 - top, least),
        tip=".2%",
    )


def _error_ticks(low: float, high: float) -> list[float]:
    """At least five round numbers from ``low`` to ``high`` if possible, none too close together."""
    apart = max(log10(high / low) / 9, 1e-9)
    ticks: list[float] = []
    for digits in (
        (1, 5),
        (2,),
        *([n / part for n in range(part, 10 * part)] for part in (1, 5, 50)),
    ):
        for step in (digit * 10.0**power for power in range(-6, 1) for digit in digits):
            if low <= step <= high and all(abs(log10(step / tick)) >= apart for tick in ticks):
                ticks.append(step)
        if len(ticks) >= 5:
            break
    return sorted(ticks)


def loss_axis(curves: Sequence[Curve]) -> Axis:
    """A linear axis from 0, or a logarithmic one for losses that differ by a factor of 20."""
    values = [value for curve in curves for value in curve.values if value is not None]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        ticks = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 3)]
        named = {tick: f"{tick:g}" for tick in ticks}
        return Axis("loss (nats, log scale)", log=True, ticks=named)
    return Axis("loss (nats)", (0, None))


def is_filled(curves: Sequence[Curve]) -> bool:
    """Whether there is a point to draw."""
    return any(value is not None for curve in curves for value in curve.values)
