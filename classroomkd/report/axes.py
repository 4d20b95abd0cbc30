"""What the report's figures share: colours, axes and captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import log10

import plotly.graph_objects as go

from classroomkd.report.numbers import spread

# Okabe and Ito's palette for colour-blind readers, without yellow, which is invisible on white, and
# two dark colours from Tol's. Markers differ too; 8 colours and 7 markers give 56 distinct pairs.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#882255", "#332288"),
)
ALONE = "#767676"  # the student alone, in every plot
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down")

MANY_CLASSES = 20  # with more, a plot needs the full width of the page

_AXIS = {"showline": True, "linecolor": "#999999", "zeroline": False, "automargin": True}


@dataclass(frozen=True)
class Plot:
    """A figure with the id of its page element, its heading and its note.

    ``wide`` figures need the full width of the page. Without a ``figure`` only the text is shown.
    """

    id: str
    heading: str
    note: str
    figure: go.Figure | None
    wide: bool = False


def curve(
    runs: Sequence[Sequence[dict]],
    value: Callable[[dict], float | None],
    name: str,
    line: dict,
    marker: str = "circle",
) -> list[go.Scatter]:
    """Traces of ``value`` over the epochs of a run's records.

    For several runs: their mean, over the epochs that all of them have, and below it a band of ±
    one sample standard deviation.
    """
    values = [{record["epoch"]: value(record) for record in records} for records in runs]
    epochs = [epoch for epoch in values[0] if all(epoch in of_run for of_run in values)]
    found = {epoch: spread([of_run[epoch] for of_run in values]) for epoch in epochs}
    middle = [both and both[0] for both in found.values()]
    trace = go.Scatter(
        x=epochs,
        y=middle,
        name=escape(name),  # plotly renders names as markup
        mode="lines+markers",
        line=line,
        marker={"symbol": marker, "size": 6, "maxdisplayed": 30},
    )
    if len(runs) == 1:
        return [trace]
    known = {
        epoch: (both[0], both[1]) for epoch, both in found.items() if both and both[1] is not None
    }
    upper, lower = ([m + side * d for m, d in known.values()] for side in (1, -1))
    band = go.Scatter(
        x=[*known, *reversed(known)],
        y=upper + lower[::-1],
        name=trace.name,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=_faint(line["color"]),
        hoverinfo="skip",
        showlegend=False,
    )
    return [band, trace]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"


def accuracy_axes(*plots: Sequence[go.Scatter]) -> dict:
    """A y-axis for the traces of all ``plots``, which it converts from top-1 to error.

    The axis is logarithmic in the error, so that curves near 100 % can be distinguished, and
    labelled with the top-1. A perfect accuracy is drawn at half of the smallest error.
    """
    traces = [trace for plot in plots for trace in plot]
    errors = [1 - y for trace in traces for y in trace.y if y is not None and y < 1]
    least = min((error for error in errors if error > 1e-9), default=0.01) / 2
    for trace in traces:
        trace.customdata = trace.y
        trace.y = [None if y is None else max(1 - y, least) for y in trace.y]
        if trace.hoverinfo != "skip":
            trace.hovertemplate = "%{customdata:.2%}"
    drawn = [y for trace in traces for y in trace.y if y is not None]
    low, high = min(drawn, default=least), max(drawn, default=1)
    ticks = _error_ticks(low, high)
    texts = [f"{100 - 100 * tick:.6g}" for tick in ticks]
    if least in drawn:
        ticks, texts = [least, *ticks], ["100", *texts]
    margin = 0.04 * log10(high / low) + 0.01
    return {
        "type": "log",
        "range": [log10(high) + margin, log10(low) - margin],
        "tickvals": ticks,
        "ticktext": texts,
    }


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


def is_filled(traces: Sequence[go.Scatter]) -> bool:
    """Whether there is a point to draw."""
    return any(value is not None for trace in traces for value in trace.y)


def over_epochs(traces: Sequence[go.Scatter], y_axis: dict) -> go.Figure:
    """The figure of traces made by `curve`, with a legend below."""
    epochs = [epoch for trace in traces for epoch in trace.x]
    # By default plotly marks fractions of an epoch if there are few epochs.
    few = {"dtick": 1} if max(epochs) - min(epochs) < 10 else {}
    figure = framed(traces, few | {"title": "epoch"}, y_axis)
    figure.update_layout(
        height=330 + 14 * sum(t.showlegend is not False for t in traces),  # with the legend
        showlegend=True,
        legend={
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "font": {"size": 12},
        },
        hovermode="x unified",
        hoverlabel={"namelength": -1},
    )
    return figure


def over_classes(figure: go.Figure, y_axis: dict, height: int) -> go.Figure:
    """The figure of traces over the same class names. ``height`` excludes the names."""
    names = figure.data[0].x
    # A category axis does not parse the names as numbers.
    classes = {"type": "category", "showgrid": False, "title": {"text": "class", "standoff": 12}}
    height += 7 * min(max(map(len, names)), 40)  # names may be vertical
    if len(names) > MANY_CLASSES:
        # At this size 100 names fit on a wide page; on a narrow one plotly drops some.
        classes |= {"tickangle": -90, "tickfont": {"size": 9}}
    figure = framed(figure, classes, y_axis)
    figure.update_layout(height=height, showlegend=False)
    return figure


def framed(drawn: Sequence | go.Figure, x_axis: dict, y_axis: dict) -> go.Figure:
    """The figure of traces, or of another figure's traces, in the style of all pages."""
    figure = go.Figure(drawn)
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#333333"},
        margin={"l": 10, "r": 10, "t": 32, "b": 10},  # the buttons are in the top margin
    )
    figure.update_xaxes(_AXIS | x_axis)
    figure.update_yaxes(_AXIS | y_axis)
    return figure
