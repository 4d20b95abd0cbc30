"""The plots of one run, as plotly figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from classroomkd.report.axes import (
    ALONE,
    COLOURS,
    MARKERS,
    Plot,
    accuracy_axes,
    curve,
    is_filled,
    over_epochs,
)
from classroomkd.report.classes import class_order, gain_plot, gains, taught_plot
from classroomkd.report.records import RunRecords, label

STUDENT = {"alone": {"color": ALONE, "dash": "dash"}, "student": {"color": "#111111"}}


def colour(run: RunRecords, phase: str, name: str) -> str:
    """The network's colour, the same in every plot and in the table."""
    return _line(phase, name, run.mentors)["color"]


def plots(run: RunRecords) -> list[Plot]:
    """Every plot that the records so far can fill."""
    drawn = []
    if run.curves:
        accuracy, validation, loss = (
            _networks(run, key) for key in ("test_top1", "validation_top1", "train_loss")
        )
        has_validation = is_filled(validation)
        taught = (
            " That of the student whom mentors teach also holds their lessons: compare its course "
            "with the others, not its height."
        )
        # The two stand side by side, to be compared.
        axis = accuracy_axes(accuracy, validation)
        drawn.append(
            Plot(
                "accuracy",
                "Held-out accuracy",
                "Share of the held-out images whose most probable class is the true one, on an "
                "axis that is logarithmic in the share of the others.",
                over_epochs(accuracy, axis | {"title": "held-out top-1 (%)"}),
            )
        )
        if has_validation:
            drawn.append(
                Plot(
                    "validation",
                    "Validation accuracy",
                    "The same on the validation images, which no network trained on and on which "
                    "choices are made.",
                    over_epochs(validation, axis | {"title": "validation top-1 (%)"}),
                )
            )
        drawn.append(
            Plot(
                "loss",
                "Training loss",
                "Mean over the training samples of an epoch." + taught * bool(run.classroom),
                over_epochs(loss, _loss_axis(loss)),
            )
        )
    drawn += lessons([run], run.mentors)
    order = class_order([gains(run, run)])
    return drawn + list(filter(None, [taught_plot(run, order), gain_plot([(run, run)], order)]))


def lessons(
    runs: Sequence[RunRecords], mentors: Sequence[str], keys: Sequence[str] | None = None
) -> list[Plot]:
    """What the mentors of runs that differ in the seed only did over time.

    A mentor's colour is that of its place in ``mentors``.
    """
    courses = [run.classroom for run in runs]
    drawn = []
    for key, heading, note, axis in _LESSONS:
        if keys is not None and key not in keys:
            continue
        traces = [
            trace
            for name in runs[0].mentors
            for trace in _traces(runs[0], "mentor", name, courses, _statistic(name, key), mentors)
        ]
        if is_filled(traces):
            drawn.append(Plot(key, heading, note, over_epochs(traces, axis)))
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


def _networks(run: RunRecords, key: str) -> list[go.Scatter]:
    return [
        trace
        for (phase, name), records in run.curves.items()
        for trace in _traces(run, phase, name, [records], lambda r: r.get(key), run.mentors)
    ]


def _traces(
    run: RunRecords,
    phase: str,
    name: str,
    courses: Sequence[list[dict]],
    value: Callable[[dict], float | None],
    mentors: Sequence[str],
) -> list[go.Scatter]:
    marker = "circle" if phase in STUDENT else MARKERS[mentors.index(name) % len(MARKERS)]
    called = label(phase, name, run.method)
    return curve(courses, value, called, _line(phase, name, mentors), marker)


def _line(phase: str, name: str, mentors: Sequence[str]) -> dict:
    if phase in STUDENT:
        return STUDENT[phase] | {"width": 3}
    return {"color": COLOURS[mentors.index(name) % len(COLOURS)], "width": 1.5}


def _loss_axis(traces: list[go.Scatter]) -> dict:
    values = [value for trace in traces for value in trace.y if value is not None]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        ticks = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 3)]
        return {"title": "loss (nats, log scale)", "type": "log", "tickvals": ticks}
    return {"title": "loss (nats)", "rangemode": "tozero"}
