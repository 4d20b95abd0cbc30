"""The page that compares runs: its table, warnings and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from itertools import cycle

from classroomkd.report.axes import ALONE, MARKERS, Curve, accuracy_axis, curve
from classroomkd.report.classes import class_order, gain_plot, gains
from classroomkd.report.drawing import Plot, over_epochs
from classroomkd.report.entries import (
    TEST,
    Entry,
    by_recipe,
    called,
    curve_groups,
    entries_of,
    finished_seeds,
)
from classroomkd.report.markup import Block, Page, Table, TableRow, warning
from classroomkd.report.numbers import UNKNOWN, differences, percent, spread
from classroomkd.report.plots import mentor_plots
from classroomkd.report.records import RunRecords, incomplete

COLUMNS = ("run", "what differs", "data", "epochs", "seed", "top-1", "best", "alone", "gain")


def comparison(runs: Sequence[RunRecords]) -> Page:
    """The page that compares ``runs``."""
    entries = entries_of(runs)
    groups = by_recipe(entries)
    rows = [row for group in groups for row in _rows(group)]
    columns, rows, common = _without_common(COLUMNS, rows)
    note = """<p class="note">
top-1: the student trained by the method, after its last epoch. best: the highest of any epoch
on the same held-out images. alone: the student trained alone, after its last epoch, in
the same run or in another one here with the same seed, images, student and training. gain: top-1
minus alone, in percentage points. –: not available, or not yet. Means ± sample standard deviations
are over the finished runs whose configurations differ only in the seed; those of the gain, over the
runs that have one.</p>"""
    return Page(
        f"Comparison of {len(runs)} runs",
        [
            _warnings(entries),
            f"<p>{escape(_in_common(entries, common))}</p>",
            Table("comparison", columns, rows, broad=True),
            note,
            *_paired(groups),
            _plots(entries, groups),
        ],
    )


def _without_common(
    columns: Sequence[str], rows: Sequence[TableRow]
) -> tuple[list[str], list[TableRow], list[str]]:
    """The table without data and epochs if all rows agree in them, and the common values."""
    same = {
        place: columns[place]
        for place in (columns.index("data"), columns.index("epochs"))
        if len({row.cells[place] for row in rows}) == 1
    }
    kept = [place for place in range(len(columns)) if place not in same]
    common = [f"{name} {rows[0].cells[place]}" for place, name in same.items()]
    rows = [row._replace(cells=[row.cells[place] for place in kept]) for row in rows]
    return [columns[place] for place in kept], rows, common


def _in_common(entries: Sequence[Entry], common: Sequence[str]) -> str:
    runs = [entry.run for entry in entries]
    facts = {
        "student": {run.student or UNKNOWN for run in runs},
        "mentors": {", ".join(run.mentors) or UNKNOWN for run in runs},
        "method": {run.method for run in runs},
    }
    told = [f"{name} {next(iter(values))}" for name, values in facts.items() if len(values) == 1]
    return "In common: " + " · ".join([*common, *told]) + "." if [*common, *told] else ""


def _paired(groups: Sequence[Sequence[Entry]]) -> list[Block]:
    """A table of top-1 of each group minus that of the first group, seed by seed."""
    tops = [
        {
            (entry.data, *sorted(entry.run.digests.items()), entry.seed): last
            for entry in finished_seeds(group)
            if (last := entry.numbers()[0]) is not None
        }
        for group in groups
    ]
    rows = []
    for group, top in list(zip(groups, tops, strict=True))[1:]:
        gained = {key[-1]: top[key] - tops[0][key] for key in tops[0] if key in top}
        middle = spread(list(gained.values()))
        if middle is None:
            continue
        error = middle[1] and middle[1] / math.sqrt(len(gained))
        each = ", ".join(
            f"{seed}: {percent((value, None), signed=True)}" for seed, value in gained.items()
        )
        what = f"{called(group)} − {called(groups[0])}"
        rows.append(
            TableRow([what, percent((middle[0], error), signed=True), str(len(gained)), each])
        )
    if not rows:
        return []
    note = """<p class="note">
In percentage points, each run minus the run of the first group with the same seed
and images: mean ± standard error over the seeds.</p>"""
    columns = ("top-1 of", "difference", "seeds", "seed by seed")
    return ["<h2>Paired differences</h2>", Table("differences", columns, rows), note]


def _warnings(entries: Sequence[Entry]) -> str:
    lines = []
    data = list(dict.fromkeys(entry.data for entry in entries))
    if len(data) > 1:
        lines.append(
            f"These runs were measured on different data sets ({', '.join(data)}): "
            "their accuracies are not comparable."
        )
    for name in data:
        digests = {entry.run.digests.get(TEST) for entry in entries if entry.data == name}
        if len(digests - {None}) > 1:
            lines.append(
                f"The runs on {name} held out different images, as splits by seed do: compare "
                "their gains rather than their accuracies."
            )
    for entry in entries:
        if entry.run.summary is None:
            lines.append(f"{entry.name} is unfinished: this is what it has recorded so far.")
        if entry.run.unreadable:
            lines.append(f"{incomplete(entry.run)} in {entry.name}.")
    return "".join(map(warning, lines))


def _rows(group: Sequence[Entry]) -> list[TableRow]:
    first: dict[str, str] = {}  # of each seed
    rows = []
    for entry in group:
        same = first.setdefault(entry.seed, entry.name)
        again = [f"repeats {same}"] * (same != entry.name)
        differs = ", ".join(filter(None, [entry.differs, *again]))
        rows.append(_row("run", [entry], entry.name, differs, entry.colour))
    seeds = finished_seeds(group)
    if len(seeds) > 1:
        rows.append(_row("mean", seeds, f"mean ± deviation, n = {len(seeds)}", seeds[0].differs))
    return rows


def _row(
    kind: str, entries: Sequence[Entry], name: str, differs: str, colour: str = ""
) -> TableRow:
    """The table row of one run, or of the runs of one recipe with different seeds."""
    seeds = [entry.seed for entry in entries]
    last, best, alone = zip(*(entry.numbers() for entry in entries), strict=True)
    own, others = (dict(zip(seeds, shares, strict=True)) for shares in (last, alone))
    gains = differences(own, others)
    cells = [name, differs, *_facts(entries[0]), ", ".join(seeds)]
    cells += [percent(spread(shares), unit="%") for shares in (last, best, alone)]
    return TableRow([*cells, percent(spread(gains), signed=True)], kind, colour)


def _facts(entry: Entry) -> list[str]:
    run = entry.run
    *_, last = run.classroom or run.student_curve("alone") or [{}]
    done, of = last.get("epoch", 0), last.get("epochs") or run.epochs
    epochs = str(done) if done == of else f"{done} of {of}"
    return [entry.data, epochs]


def _plots(entries: Sequence[Entry], groups: Sequence[Sequence[Entry]]) -> list[Plot]:
    several_sets = len({entry.data for entry in entries}) > 1

    def title(group: Sequence[Entry]) -> str:
        return called(group) + f" on {group[0].data}" * several_sets

    drawn = []
    curves = _accuracies(entries, groups, title)
    if curves:
        axis = accuracy_axis("held-out top-1 (%)", curves)
        drawn.append(
            Plot(
                "accuracy",
                "Held-out accuracy of the students",
                "Top-1 on the held-out images, on an axis that is logarithmic in the error. Solid: "
                "with mentors; dashed and grey: alone. For several seeds, the mean with a band of "
                "± one sample standard deviation.",
                over_epochs(curves, axis, wide=True),
            )
        )
    mentors = list(dict.fromkeys(name for entry in entries for name in entry.run.mentors))
    for number, group in enumerate(groups, start=1):
        group = curve_groups(group)[0]
        for plot in mentor_plots(
            [entry.run for entry in group], mentors, ("active_share", "temperature")
        ):
            heading = f"{plot.heading}: {title(group)}"
            drawn.append(replace(plot, id=f"{plot.id}-{number}", heading=heading))
    return drawn + _gains(groups, title)


def _accuracies(
    entries: Sequence[Entry],
    groups: Sequence[Sequence[Entry]],
    title: Callable[[Sequence[Entry]], str],
) -> list[Curve]:
    """Curves of each group's students, then those of the students alone, which groups may share."""
    curves = []
    for group in groups:
        for several in curve_groups(group):
            taught = [entry.run.classroom for entry in several if entry.run.classroom]
            line = {"color": group[0].colour, "linewidth": 2.5}
            curves += _curve(taught, title(several), line, group[0].marker)
    students: dict[str, dict[str, Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.run.summary is None):
        if entry.run.student_curve("alone"):  # one per seed, preferably finished
            students.setdefault(entry.student, {}).setdefault(entry.seed, entry)
    for seeds, marker in zip(students.values(), cycle(MARKERS), strict=False):
        for several in curve_groups(list(seeds.values())):
            alone = [entry.run.student_curve("alone") for entry in several]
            line = {"color": ALONE, "linewidth": 2, "linestyle": "--"}
            curves += _curve(alone, f"student alone: {title(several)}", line, marker)
    return curves


def _curve(runs: list[list[dict]], name: str, line: dict, marker: str) -> list[Curve]:
    return [curve(runs, lambda r: r.get("test_top1"), name, line, marker)] if runs else []


def _gains(
    groups: Sequence[Sequence[Entry]], title: Callable[[Sequence[Entry]], str]
) -> list[Plot]:
    """Gains per class of each group, with the same order of classes and the same scale."""
    known = {
        number: [
            entry for entry in finished_seeds(group) or group[:1] if gains(entry.run, entry.alone)
        ]
        for number, group in enumerate(groups, start=1)
    }
    of_groups = [[gains(entry.run, entry.alone) for entry in group] for group in known.values()]
    order = class_order([gained for group in of_groups for gained in group])
    spreads = [spread(values) for group in of_groups for values in zip(*group, strict=False)]
    most = max((abs(both[0]) + (both[1] or 0) for both in spreads if both), default=None)
    drawn = []
    for number, group in known.items():
        pairs = [(entry.run, entry.alone) for entry in group]
        if pairs and (plot := gain_plot(pairs, order, most if len(groups) > 1 else None)):
            heading = f"{plot.heading}: {title(group)}"
            drawn.append(replace(plot, id=f"{plot.id}-{number}", heading=heading))
    return drawn
