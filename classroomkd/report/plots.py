"""The plots of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from classroomkd.report.axes import (
    ALONE,
    COLOURS,
    INK,
    MARKERS,
    Axis,
    Curve,
    accuracy_axis,
    curve,
    is_filled,
    loss_axis,
)
from classroomkd.report.classes import class_order, gain_plot, gains, taught_plot
from classroomkd.report.drawing import Plot, over_epochs
from classroomkd.report.records import RunRecords, label

STUDENT = {"alone": {"color": ALONE, "linestyle": "--"}, "student": {"color": INK}}


def colour(run: RunRecords, phase: str, name: str) -> str:
    """A network's colour, the same in all plots and in the table."""
    return _line(phase, name, run.mentors)["color"]


def plots(run: RunRecords) -> list[Plot]:
    """All plots for which there are records."""
    drawn = []
    if run.curves:
        accuracy, validation, loss = (
            _networks(run, key) for key in ("test_top1", "validation_top1", "train_loss")
        )
        both = accuracy, validation  # share their axis, to be compared side by side
        has_validation = is_filled(validation)
        taught = (
            " The loss of the student with mentors includes the mentor terms: compare its shape "
            "with the other curves, not its value."
        )
        drawn.append(
            Plot(
                "accuracy",
                "Held-out accuracy",
                "Top-1 on the held-out images, on an axis that is logarithmic in the error.",
                over_epochs(accuracy, accuracy_axis("held-out top-1 (%)", *both)),
            )
        )
        if has_validation:
            drawn.append(
                Plot(
                    "validation",
                    "Validation accuracy",
                    "The same on the validation images, which are not used for training but to "
                    "select epochs.",
                    over_epochs(validation, accuracy_axis("validation top-1 (%)", *both)),
                )
            )
        drawn.append(
            Plot(
                "loss",
                "Training loss",
                "Mean over the training images of an epoch." + taught * bool(run.classroom),
                over_epochs(loss, loss_axis(loss)),
            )
        )
    drawn += mentor_plots([run], run.mentors)
    order = class_order([gains(run, run)])
    return drawn + list(filter(None, [taught_plot(run, order), gain_plot([(run, run)], order)]))


def mentor_plots(
    runs: Sequence[RunRecords], mentors: Sequence[str], keys: Sequence[str] | None = None
) -> list[Plot]:
    """The mentors' statistics over the epochs, for runs that differ only in the seed.

    A mentor's colour is given by its index in ``mentors``.
    """
    records = [run.classroom for run in runs]
    drawn = []
    for key, heading, note, axis in _STATISTICS:
        if keys is not None and key not in keys:
            continue
        curves = [
            _curve(runs[0], "mentor", name, records, _statistic(name, key), mentors)
            for name in runs[0].mentors
        ]
        if is_filled(curves):
            drawn.append(Plot(key, heading, note, over_epochs(curves, axis)))
    return drawn


_STATISTICS = (
    (
        "active_share",
        "Active mentors",
        "Share of the training images on which the mentor taught.",
        Axis("images taught (%)", (-0.03, 1.03), percent=True, tip=".1%"),
    ),
    (
        "temperature",
        "Mentor temperature",
        "Temperature of the mentor's KD term; 1 means no softening. Mean over all images.",
        Axis("temperature τ (no unit)"),
    ),
    (
        "rank_weight",
        "Rank weight",
        "The mentor's share of the total confidence in the true class, of student and mentors, "
        "times the number of mentors. Mean over all images.",
        Axis("rank weight r (no unit)"),
    ),
    (
        "kl",
        "Divergence from the mentor",
        "KL divergence between mentor and student, both softened. Mean over the images on which "
        "the mentor taught: noisy if they are few, 0 if there are none.",
        Axis("KL (nats)", (0, None)),
    ),
)


def _statistic(name: str, key: str) -> Callable[[dict], float | None]:
    return lambda record: ((record.get("mentors") or {}).get(name) or {}).get(key)


def _networks(run: RunRecords, key: str) -> list[Curve]:
    return [
        _curve(run, phase, name, [records], lambda r: r.get(key), run.mentors)
        for (phase, name), records in run.curves.items()
    ]


def _curve(
    run: RunRecords,
    phase: str,
    name: str,
    records: Sequence[list[dict]],
    value: Callable[[dict], float | None],
    mentors: Sequence[str],
) -> Curve:
    marker = MARKERS[0] if phase in STUDENT else MARKERS[mentors.index(name) % len(MARKERS)]
    text = label(phase, name, run.method)
    return curve(records, value, text, _line(phase, name, mentors), marker)


def _line(phase: str, name: str, mentors: Sequence[str]) -> dict:
    if phase in STUDENT:
        return STUDENT[phase] | {"linewidth": 3}
    return {"color": COLOURS[mentors.index(name) % len(COLOURS)], "linewidth": 1.5}
