"""What the report's figures have in common: colours, axes, and the words around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

# Okabe and Ito's palette for colour-blind readers, without the yellow that white swallows, and two
# dark ones of Tol's. Marker shapes differ as well, and as 8 and 7 share no factor, 56 pass before a
# pair repeats.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#882255", "#332288"),
)
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down")

MANY_CLASSES = 20  # with more a plot needs the page's whole width

_AXIS = {"showline": True, "linecolor": "#999999", "zeroline": False, "automargin": True}


@dataclass(frozen=True)
class Plot:
    """A figure, the id of the page element that it goes into, and the words around it.

    ``wide``: it needs the page's whole width.
    """

    id: str
    heading: str
    note: str
    figure: go.Figure
    wide: bool = False


def curve(
    records: Sequence[dict],
    value: Callable[[dict], float | None],
    name: str,
    line: dict,
    marker: str = "circle",
) -> go.Scatter:
    """A trace of ``value`` over the epochs of ``records``."""
    return go.Scatter(
        x=[record["epoch"] for record in records],
        y=[value(record) for record in records],
        name=escape(name),  # plotly reads names as markup
        mode="lines+markers",
        line=line,
        marker={"symbol": marker, "size": 6, "maxdisplayed": 30},
    )


def is_filled(traces: Sequence[go.Scatter]) -> bool:
    """Whether there is a point to draw."""
    return any(value is not None for trace in traces for value in trace.y)


def over_epochs(traces: Sequence[go.Scatter], y_axis: dict) -> go.Figure:
    """The figure of traces that `curve` has made, with a legend below."""
    epochs = [epoch for trace in traces for epoch in trace.x]
    # Left alone, plotly marks fractions of an epoch where there are few.
    few = {"dtick": 1} if max(epochs) - min(epochs) < 10 else {}
    figure = framed(traces, few | {"title": "epoch"}, y_axis)
    figure.update_layout(
        height=330 + 14 * len(traces),  # the legend takes its share
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


def over_classes(trace: go.Bar | go.Heatmap, y_axis: dict, height: int) -> go.Figure:
    """The figure of one trace whose x are class names; what does not fit shows on hovering.

    ``height`` is without the names.
    """
    # Of the type that says that names are no numbers.
    classes = {"type": "category", "showgrid": False, "title": {"text": "class", "standoff": 8}}
    height += 7 * min(max(map(len, trace.x)), 40)  # they may stand upright
    if len(trace.x) > MANY_CLASSES:
        # So small, 100 names stand on a wide page; on a narrow one plotly thins them out.
        classes |= {"tickangle": -90, "tickfont": {"size": 9}}
    figure = framed([trace], classes, y_axis)
    figure.update_layout(height=height, showlegend=False)
    return figure


def framed(traces: Sequence, x_axis: dict, y_axis: dict) -> go.Figure:
    """The figure of ``traces`` in the style of all pages."""
    figure = go.Figure(traces)
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#333333"},
        xaxis=_AXIS | x_axis,
        yaxis=_AXIS | y_axis,
        margin={"l": 10, "r": 10, "t": 32, "b": 10},  # the buttons stand in the top margin
    )
    return figure
