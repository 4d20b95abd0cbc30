"""Plots over the classes: which of them each mentor taught, and what the classroom gained them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import mean

import plotly.graph_objects as go

from classroomkd.report.figures import COLOURS, MANY_CLASSES, Plot, over_classes
from classroomkd.report.numbers import spread
from classroomkd.report.records import Run


def taught_plot(run: Run) -> Plot | None:
    """Mentors × classes: on what share of a class's images the mentor would still teach."""
    taught = (run.summary or {}).get("taught") or {}
    mentors = [name for name in run.mentors if name in taught]
    columns = zip(*(taught[name] for name in mentors), strict=True)
    classes = [
        (name, shares)
        for name, shares in zip(_names(run), columns, strict=False)
        if any(share is not None for share in shares)
    ]
    if not classes:
        return None
    classes.sort(key=lambda item: -mean(share for share in item[1] if share is not None))
    trace = go.Heatmap(
        x=[escape(name) for name, _ in classes],
        y=[escape(name) for name in mentors],
        z=[list(row) for row in zip(*(shares for _, shares in classes), strict=True)],
        zmin=0,
        zmax=1,
        colorscale=["#f2f2f2", COLOURS[0], "#002b45"],
        hovertemplate="%{y}, %{x}: %{z:.1%}<extra></extra>",
        colorbar={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "thickness": 10,
            "tickformat": ".0%",
            "outlinewidth": 0,
        },
    )
    axis = {"autorange": "reversed", "showgrid": False, "title": "mentor"}
    figure = over_classes(trace, axis, height=190 + 26 * len(mentors))
    figure.update_layout(margin={"t": 72})  # the buttons, and below them the scale
    return Plot(
        "taught",
        "What each mentor taught",
        "Share of a class's held-out images on which the mentor gives the true class at least the "
        "probability that the student gives it after its last epoch. Classes from left to right by "
        "the mean over the mentors.",
        figure,
        wide=len(classes) > MANY_CLASSES,
    )


def gain_plot(pairs: Sequence[tuple[Run, Run]]) -> Plot | None:
    """Per class, top-1 taught by mentors less that alone, in points; the mean over ``pairs``.

    The second of a pair is the run, maybe the same, in which the student was trained alone.
    """
    known = list(filter(None, (gains(*pair) for pair in pairs)))
    names = _names(pairs[0][0])
    bars = []
    for name, *values in zip(names, *known, strict=False):
        if middle := spread([100 * value for value in values if value is not None]):
            bars.append((escape(name), *middle))
    if not bars:
        return None
    bars.sort(key=lambda bar: -bar[1])
    names, heights, deviations = zip(*bars, strict=True)
    trace = go.Bar(
        x=names,
        y=heights,
        error_y={"array": deviations, "thickness": 1, "width": 2} if len(known) > 1 else None,
        marker={"color": [COLOURS[0] if height >= 0 else COLOURS[1] for height in heights]},
        hovertemplate="%{x}: %{y:+.2f} points<extra></extra>",
    )
    data = pairs[0][0].summary["data"]
    images = data["test_images"] / data["classes"]
    note = (
        "For each class, top-1 of the student taught by mentors less that of the student alone, "
        f"after the last epoch of each. A class has about {images:,.0f} held-out images: "
        f"one of them is {100 / images:.2g} points."
    )
    if len(known) > 1:
        note += f" Mean and sample standard deviation over {len(known)} seeds."
    return Plot(
        "gain",
        "Gain per class",
        note,
        over_classes(trace, {"title": "gain (percentage points)", "zeroline": True}, height=340),
        wide=len(bars) > MANY_CLASSES,
    )


def _names(run: Run) -> list[str]:
    data = (run.summary or {}).get("data", {})
    return data.get("class_names") or [str(number) for number in range(data.get("classes", 0))]


def gains(run: Run, alone_in: Run) -> list[float | None]:
    """Top-1 of each class's images, less that of the student alone; empty if one is not known."""
    classroom, alone = (
        of.result(phase).get("per_class") or []
        for of, phase in ((run, "classroom"), (alone_in, "alone"))
    )
    return [
        None if mine is None or others is None else mine - others
        for mine, others in zip(classroom, alone, strict=False)  # either may be missing
    ]
