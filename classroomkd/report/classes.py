"""Plots per class: which classes each mentor taught, and the student's gain."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from classroomkd.report.axes import COLOURS, Axis
from classroomkd.report.drawing import Plot, bars, heat_maps, thinned
from classroomkd.report.numbers import spread
from classroomkd.report.records import RunRecords

_MOST_ROWS = 40  # epochs per heat map
_MOST_CELLS = 40_000  # in all heat maps of a page, whose numbers are in it too


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
    *_, last = taught
    mentors = list(taught[last])
    cells = len(mentors) * max(map(len, taught[last].values()))  # an epoch
    epochs = thinned(list(taught), min(_MOST_ROWS, max(2, _MOST_CELLS // cells)))
    shares = {name: [taught[epoch].get(name) or [] for epoch in epochs] for name in mentors}
    counted = len(shares[mentors[0]][-1])
    names = _names(run) or [str(number) for number in range(counted)]
    seen = [c for c in order or range(counted) if shares[mentors[0]][-1][c] is not None]
    maps = {name: [[of[c] for c in seen] for of in shares[name]] for name in mentors}
    colours = ("#f2f2f2", COLOURS[0], "#002b45")
    drawing = heat_maps(maps, epochs, [names[c] for c in seen], colours)
    loss = run.settings.get("loss")
    loss = loss if isinstance(loss, dict) else {}
    rule = ", ".join(f"{key} {loss[key]}" for key in ("knowledge_filter", "ranking") if key in loss)
    return Plot(
        "taught",
        "Which classes each mentor teaches",
        "Share of a class's held-out images on which the mentor would teach the student, as of the "
        f"end of the epoch, under the run's knowledge filter{f' ({rule})' if rule else ''}. Epochs "
        "run downwards"
        + ("" if len(epochs) == len(taught) else f"; {len(epochs)} of {len(taught)} are shown")
        + (", classes in the order of their gain." if order else "."),
        drawing,
    )


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
    gained = []
    for number in order:
        values = [value for of in known if (value := of[number]) is not None]
        if middle := spread([100 * value for value in values]):
            gained.append((names[number], *middle))
    if not gained:
        return None
    classes, heights, deviations = zip(*gained, strict=True)
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
        note += f" It is 0 for each of the {len(gained)} classes."
        return Plot("gain", "Gain per class", note, None)
    limits = (-110 * most, 110 * most) if most else (None, None)
    axis = Axis("gain (percentage points)", limits, tip="+.2f")
    drawing = bars(classes, heights, deviations, COLOURS[:2], axis)
    return Plot("gain", "Gain per class", note, drawing)


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
