"""The report's plots, as plotly figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from classroomkd.report.records import Run, label

# Okabe and Ito's palette for colour-blind readers, without the yellow that white swallows. Marker
# shapes differ as well, and as 6 and 7 share no factor, 42 mentors pass before a pair repeats.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down")
STUDENT = {"alone": {"color": "#767676", "dash": "dash"}, "classroom": {"color": "#111111"}}


@dataclass(frozen=True)
class Plot:
    """A figure, the id of the page element that it goes into, and the words around it."""

    id: str
    heading: str
    note: str
    figure: go.Figure


def colour(run: Run, phase: str, name: str) -> str:
    """The network's colour, the same in every plot and in the table."""
    if phase in STUDENT:
        return STUDENT[phase]["color"]
    return COLOURS[run.mentors.index(name) % len(COLOURS)]


def plots(run: Run) -> list[Plot]:
    """Every plot that the records so far can fill."""
    drawn = []
    if run.curves:
        accuracy, loss = (_networks(run, key) for key in ("test_top1", "train_loss"))
        drawn += [
            Plot(
                "accuracy",
                "Held-out accuracy",
                "Share of the held-out images whose most probable class is the true one.",
                _figure(accuracy, {"title": "held-out top-1 (%)", "tickformat": ".2~%"}),
            ),
            Plot(
                "loss",
                "Training loss",
                "The classroom's loss also holds the mentors' lessons: compare its course with the "
                "others, not its height.",
                _figure(loss, _loss_axis(loss)),
            ),
        ]
    for key, heading, note, axis in _LESSONS:
        traces = [
            _trace(run, "mentor", name, run.classroom, _statistic(name, key))
            for name in run.mentors
        ]
        if any(value is not None for trace in traces for value in trace.y):
            drawn.append(Plot(key, heading, note, _figure(traces, axis)))
    return drawn


_LESSONS = (
    (
        "active_share",
        "Active mentors",
        "Share of the training samples on which the mentor taught.",
        {"title": "samples taught (%)", "tickformat": ".0%", "range": [-0.03, 1.03]},
    ),
    (
        "temperature",
        "Mentor temperature",
        "How much the mentor's lesson was softened; 1 is not at all. Mean over all samples.",
        {"title": "temperature τ (no unit)"},
    ),
    (
        "rank_weight",
        "Rank weight",
        "The mentor's share of the classroom's confidence in the true class, times the number of "
        "mentors. Mean over all samples.",
        {"title": "rank weight r (no unit)"},
    ),
    (
        "kl",
        "Divergence from the mentor",
        "KL from mentor to student, both softened. Mean over only those samples on which "
        "the mentor taught: where they are few it jumps, and where there are none it is 0.",
        {"title": "KL (nats)", "rangemode": "tozero"},
    ),
)


def _statistic(name: str, key: str) -> Callable[[dict], float | None]:
    return lambda record: ((record.get("mentors") or {}).get(name) or {}).get(key)


def _networks(run: Run, key: str) -> list[go.Scatter]:
    return [
        _trace(run, phase, name, records, lambda record: record.get(key))
        for (phase, name), records in run.curves.items()
    ]


def _trace(
    run: Run, phase: str, name: str, records: list[dict], value: Callable[[dict], float | None]
) -> go.Scatter:
    student = phase in STUDENT
    shape = "circle" if student else MARKERS[run.mentors.index(name) % len(MARKERS)]
    line = {"color": colour(run, phase, name), "width": 3 if student else 1.5}
    return go.Scatter(
        x=[record["epoch"] for record in records],
        y=[value(record) for record in records],
        name=escape(label(phase, name)),  # plotly reads names as markup
        mode="lines+markers",
        line=line | STUDENT.get(phase, {}),
        marker={"symbol": shape, "size": 6, "maxdisplayed": 30},
    )


def _loss_axis(traces: list[go.Scatter]) -> dict:
    values = [value for trace in traces for value in trace.y if value is not None]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        ticks = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 3)]
        return {"title": "loss (nats, log scale)", "type": "log", "tickvals": ticks}
    return {"title": "loss (nats)", "rangemode": "tozero"}


def _figure(traces: list[go.Scatter], y_axis: dict) -> go.Figure:
    epochs = [epoch for trace in traces for epoch in trace.x]
    # Left alone, plotly marks fractions of an epoch where there are few.
    few = {"dtick": 1} if max(epochs) - min(epochs) < 10 else {}
    axis = {"showline": True, "linecolor": "#999999", "zeroline": False, "automargin": True}
    figure = go.Figure(traces)
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#333333"},
        xaxis=axis | few | {"title": "epoch"},
        yaxis=axis | y_axis,
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
        margin={"l": 10, "r": 10, "t": 32, "b": 10},  # the buttons stand in the top margin
    )
    return figure
