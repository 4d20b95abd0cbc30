"""Plots per class: which classes each mentor taught, and the student's gain."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import mean

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from classroomkd.report.axes import COLOURS, MANY_CLASSES, Plot, over_classes
from classroomkd.report.numbers import spread
from classroomkd.report.records import RunRecords

_MOST_ROWS = 40  # epochs per heat map
_GAP = 34  # pixels between two heat maps, for a mentor's name


def taught_plot(run: RunRecords, order: Sequence[int]) -> Plot | None:
    """One heat map per mentor, classes × epochs: the share of images on which it would teach."""
    taught = {
        record["epoch"]: {name: numbers["taught"] for name, numbers in mentors.items()}
        for record in run.classroom
        if (mentors := record.get("mentors"))
        and all(numbers.get("taught") for numbers in mentors.values())
    }
    if not taught:
        return None
    epochs = _thinned(list(taught))
    mentors = list(taught[epochs[-1]])
    shares = {name: [taught[epoch].get(name) or [] for epoch in epochs] for name in mentors}
    counted = len(shares[mentors[0]][-1])
    names = _names(run) or [str(number) for number in range(counted)]
    seen = [c for c in order or range(counted) if shares[mentors[0]][-1][c] is not None]
    panel = min(max(40, 12 * len(epochs)), 120)
    inner = panel * len(mentors) + _GAP * (len(mentors) - 1)
    figure = make_subplots(
        len(mentors),
        shared_xaxes=True,
        vertical_spacing=_GAP / inner,
        subplot_titles=[escape(name) for name in mentors],
    )
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    for row, name in enumerate(mentors, start=1):
        trace = go.Heatmap(
            x=[escape(names[c]) for c in seen],
            y=epochs,
            z=[[of_epoch[c] for c in seen] for of_epoch in shares[name]],
            coloraxis="coloraxis",
            hovertemplate="%{x}, epoch %{y}: %{z:.1%}<extra>" + escape(name) + "</extra>",
        )
        figure.add_trace(trace, row, 1)
    ends = sorted({epochs[0], epochs[-1]})
    # Labelled once, because the heat maps may be low.
    axis = {"autorange": "reversed", "showgrid": False, "tickvals": ends}
    figure = over_classes(figure, axis, height=inner + 130)
    figure.update_xaxes(title_text="")  # plotly would draw it over the names
    figure.update_yaxes(title_text="epoch", row=1, col=1)
    figure.update_layout(
        margin={"t": 96},  # for the buttons, the scale and the first mentor's name
        coloraxis={
            "cmin": 0,
            "cmax": 1,
            "colorscale": ["#f2f2f2", COLOURS[0], "#002b45"],
            "colorbar": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1 + 24 / inner,
                "yanchor": "bottom",
                "thickness": 10,
                "tickformat": ".0%",
                "outlinewidth": 0,
            },
        },
    )
    loss = run.settings.get("loss")
    loss = loss if isinstance(loss, dict) else {}
    rule = ", ".join(f"{key} {loss[key]}" for key in ("knowledge_filter", "ranking") if key in loss)
    return Plot(
        "taught",
        "Which classes each mentor teaches",
        "Share of a class's held-out images on which the mentor would teach the student, as of the "
        f"end of the epoch, under the run's knowledge filter{f' ({rule})' if rule else ''}. Epochs "
        "run downwards"
        + ("." if len(epochs) == len(taught) else f"; {len(epochs)} of {len(taught)} are shown."),
        figure,
        wide=len(seen) > MANY_CLASSES,
    )


def _thinned(epochs: list[int]) -> list[int]:
    """At most `_MOST_ROWS` evenly spaced epochs, including the first and the last."""
    count = min(len(epochs), _MOST_ROWS)
    last = len(epochs) - 1
    return [epochs[round(place * last / max(count - 1, 1))] for place in range(count)]


def class_order(gained: Sequence[Sequence[float | None]]) -> list[int]:
    """The classes that have gains, sorted by their mean over ``gained``, ties in the data's order.

    Charts on the same page share this order.
    """
    means = {
        number: mean(known)
        for number in range(max(map(len, gained), default=0))
        if (known := [v for g in gained if len(g) > number and (v := g[number]) is not None])
    }
    return sorted(means, key=lambda number: -means[number])


def gain_plot(
    pairs: Sequence[tuple[RunRecords, RunRecords]], order: Sequence[int], most: float | None = None
) -> Plot | None:
    """Top-1 per class with mentors minus alone, in percentage points, averaged over ``pairs``.

    The second run of a pair, possibly the same as the first, trained the student alone. The axis
    covers gains from -``most`` to ``most``.
    """
    known = list(filter(None, (gains(*pair) for pair in pairs)))
    names = _names(pairs[0][0])
    bars = []
    for number in order:
        values = [value for of in known if (value := of[number]) is not None]
        if middle := spread([100 * value for value in values]):
            bars.append((escape(names[number]), *middle))
    if not bars:
        return None
    classes, heights, deviations = zip(*bars, strict=True)
    summary = pairs[0][0].summary
    assert summary is not None  # it has the gains
    data = summary["data"]
    images = data["test_images"] / data["classes"]
    note = (
        "Top-1 per class of the student with mentors minus that of the student alone, each after "
        f"its last epoch. A class has about {images:,.0f} held-out images; one image is "
        f"{100 / images:.2g} points."
    )
    if len(known) > 1:
        note += f" Mean and sample standard deviation over {len(known)} seeds."
    if not any(value for of in known for value in of):
        note += f" It is 0 for each of the {len(bars)} classes."
        return Plot("gain", "Gain per class", note, None)
    trace = go.Bar(
        x=classes,
        y=heights,
        error_y={"array": deviations, "thickness": 1, "width": 2} if len(known) > 1 else None,
        marker={"color": [COLOURS[0] if height >= 0 else COLOURS[1] for height in heights]},
        hovertemplate="%{x}: %{y:+.2f} points<extra></extra>",
    )
    axis = {"title": "gain (percentage points)", "zeroline": True}
    axis |= {"range": [-110 * most, 110 * most]} if most else {}
    figure = over_classes(go.Figure(trace), axis, height=340)
    return Plot("gain", "Gain per class", note, figure, wide=len(bars) > MANY_CLASSES)


def _names(run: RunRecords) -> list[str]:
    data = (run.summary or {}).get("data", {})
    return data.get("class_names") or [str(number) for number in range(data.get("classes", 0))]


def gains(run: RunRecords, alone_in: RunRecords) -> list[float | None]:
    """Top-1 per class minus that of the student alone; empty if one of them is unknown."""
    classroom, alone = (
        of.result(phase).get("per_class") or []
        for of, phase in ((run, "student"), (alone_in, "alone"))
    )
    return [
        None if mine is None or others is None else mine - others
        for mine, others in zip(classroom, alone, strict=False)  # either may be missing
    ]
