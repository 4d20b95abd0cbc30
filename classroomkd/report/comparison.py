"""What a page that compares runs says: its table, its warnings, its plots."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from classroomkd.report.classes import gain_plot, gains
from classroomkd.report.document import Row, sections, table, warning
from classroomkd.report.figures import COLOURS, MARKERS, Plot, curve, over_epochs
from classroomkd.report.numbers import UNKNOWN, counted, differences, percent, spread
from classroomkd.report.plots import lessons
from classroomkd.report.records import Run, incomplete

COLUMNS = (
    "run",
    "data",
    "student",
    "mentors",
    "method",
    "epochs",
    "seed",
    "top-1",
    "best",
    "alone",
    "gain",
)

_TEST = "the test images"  # in a run's digests

# What a run's numbers do not depend on by design, or by more than its seed.
_NOT_RECIPE = (
    "seed",
    "data",
    "device",
    "threads",
    "store",
    "checkpoint_epochs",
    "checkpoint_minutes",
    "checkpoint_keep",
    "tensorboard",
)
# Nor those of the student trained alone.
_TEACHING = (
    "alone",
    "method",
    "method_options",
    "mentors",
    "mentor_training",
    "mentor_seed",
    "loss",
    "ranking_across_processes",
)


@dataclass(frozen=True)
class _Entry:
    """A run in the comparison.

    ``data`` is the name of its data set, unique among those. The student was trained ``alone`` in
    this run or, if not, in another one of the same seed and recipe, the teaching apart. ``group``
    is equal in runs that differ in their seed only.
    """

    run: Run
    name: str
    data: str
    alone: Run
    group: str
    colour: str
    marker: str

    def numbers(self) -> tuple[float | None, float | None, float | None]:
        """Top-1 of the last epoch, of the best, and of the student alone after its last.

        None what is not known before the end of a training; the last also where it is the first.
        """
        taught = "alone" if self.run.method == "alone" else "classroom"
        last, alone = _last(self.run, taught), _last(self.alone, "alone")
        best = self.run.result(taught).get("best_test_top1")
        if best is None and last is not None:
            curve = self.run.student_curve(taught)
            known = (r["test_top1"] for r in curve if r.get("test_top1") is not None)
            best = max(known, default=None)
        return last, best, None if taught == "alone" else alone


def _last(run: Run, phase: str) -> float | None:
    if result := run.result(phase):
        return result.get("top1")
    *_, last = run.student_curve(phase) or [{}]
    return last.get("test_top1") if last and last["epoch"] == last.get("epochs") else None


def _recipe(run: Run, data: str, without: Sequence[str] = ()) -> str | None:
    """Equal in runs that differ in their seed only; None if the configuration is not known."""
    settings = run.settings
    if not settings:
        return None
    left_out = {*_NOT_RECIPE, *without}
    rest = {key: value for key, value in settings.items() if key not in left_out}
    if isinstance(settings.get("data"), dict):
        rest["data"] = settings["data"] | {"source": None, "loader": None}
    kind = str(settings.get("device")).split(":")[0]  # cuda:0 and cuda:1 do the same
    return json.dumps([data, kind, rest], sort_keys=True, default=str)


def comparison(runs: Sequence[Run]) -> tuple[str, str]:
    """The title and the HTML body of the page that compares ``runs``."""
    entries = _entries(runs)
    groups = _groups(entries)
    body = f"""{_warnings(entries)}
{table(COLUMNS, [row for group in groups for row in _rows(group)])}
<p class="note">top-1 is that of the student, taught by the method, after its last epoch; best is
the highest of any epoch on these same held-out images; alone is that of the student trained alone
after its last epoch, in the same run or in another one here with the same seed, images, student and
training; gain is top-1 less alone, in percentage points; – is where there is none, or not yet. A
mean ± sample standard deviation goes over the finished runs whose configurations differ in the seed
only, that of the gain over those that have one.</p>
{sections(_plots(entries, groups))}"""
    return f"Comparison of {len(runs)} runs", body


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ending of each path, its last name at best, that no other path has.

    ``paths`` are absolute and differ.
    """
    parts = [path.parts for path in paths]

    def shortest(own: tuple[str, ...]) -> str:
        endings = (own[-count:] for count in range(1, len(own) + 1))
        unique = (e for e in endings if sum(other[-len(e) :] == e for other in parts) == 1)
        return str(Path(*next(unique)))

    return [shortest(own) for own in parts]


def _entries(runs: Sequence[Run]) -> list[_Entry]:
    names = unique_names([_absolute(run.folder) for run in runs])
    # A data set is where it lies, or the same as another if it has the same held-out images.
    seen: dict[str, Path] = {}
    places = []
    for run in runs:
        place = _absolute(run.source or run.data or "unknown")
        places.append(seen.setdefault(run.digests.get(_TEST) or str(place), place))
    distinct = list(dict.fromkeys(places))
    called = dict(zip(distinct, unique_names(distinct), strict=True))
    data = [called[place] for place in places]
    recipes = [_recipe(*of) or name for *of, name in zip(runs, data, names, strict=True)]
    kinds = list(dict.fromkeys(recipes))

    # As the tables of `classroomkd reproduce` do, a run is compared with that of its own seed.
    students = [
        (_recipe(run, name, _TEACHING), *sorted(run.digests.items()), str(run.fact("seed")))
        for run, name in zip(runs, data, strict=True)
    ]
    alone = {
        student: run
        for student, run in reversed(list(zip(students, runs, strict=True)))
        if student[0] and _last(run, "alone") is not None
    }
    return [
        _Entry(
            run,
            names[number],
            data[number],
            run if run.student_curve("alone") else alone.get(students[number], run),
            recipes[number],
            COLOURS[(kinds.index(recipes[number]) if len(kinds) > 1 else number) % len(COLOURS)],
            MARKERS[number % len(MARKERS)],
        )
        for number, run in enumerate(runs)
    ]


def _absolute(path: Path | str) -> Path:
    return Path(os.path.abspath(path))  # not resolved: a link's own name is what people gave it


def _groups(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    """The runs of one recipe together, in the order of the first ones."""
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return list(groups.values())


def _seeds(group: Sequence[_Entry]) -> list[_Entry]:
    """The finished runs of a group, one for each seed."""
    seeds: dict[str, _Entry] = {}
    for entry in group:
        if entry.run.summary is not None:
            seeds.setdefault(str(entry.run.fact("seed")), entry)
    return list(seeds.values())


def _warnings(entries: Sequence[_Entry]) -> str:
    lines = []
    data = list(dict.fromkeys(entry.data for entry in entries))
    if len(data) > 1:
        lines.append(
            f"These runs were measured on different data sets ({', '.join(data)}): "
            "their accuracies do not compare."
        )
    for name in data:
        digests = {entry.run.digests.get(_TEST) for entry in entries if entry.data == name}
        if len(digests - {None}) > 1:
            lines.append(
                f"The runs on {name} held out different images, as a split by seed does: "
                "their gains compare better than their accuracies."
            )
    for entry in entries:
        if entry.run.summary is None:
            lines.append(f"{entry.name} is unfinished: here is what it has recorded so far.")
        if entry.run.unreadable:
            lines.append(f"{incomplete(entry.run)} in {entry.name}.")
    return "".join(map(warning, lines))


def _rows(group: Sequence[_Entry]) -> list[Row]:
    rows = [_row("run", [entry], entry.name, entry.colour) for entry in group]
    seeds = _seeds(group)
    if len(seeds) > 1:
        rows.append(_row("mean", seeds, f"mean ± deviation, n = {len(seeds)}"))
    return rows


def _row(kind: str, entries: Sequence[_Entry], name: str, colour: str = "") -> Row:
    """A line of one run, or of those of one recipe with different seeds."""
    seeds = [str(entry.run.fact("seed")) for entry in entries]
    last, best, alone = zip(*(entry.numbers() for entry in entries), strict=True)
    gains = differences(*(dict(zip(seeds, shares, strict=True)) for shares in (last, alone)))
    cells = [name, *_facts(entries[0]), ", ".join(seeds).replace("None", UNKNOWN)]
    cells += [percent(spread(shares), unit="%") for shares in (last, best, alone)]
    return Row([*cells, percent(spread(gains), signed=True)], kind, colour)


def _facts(entry: _Entry) -> list[str]:
    run = entry.run
    *_, last = run.classroom or run.student_curve("alone") or [{}]
    done, of = last.get("epoch", 0), last.get("epochs") or run.epochs
    epochs = str(done) if done == of else f"{done} of {of}"
    mentors = ", ".join(run.mentors) or UNKNOWN
    return [entry.data, run.student or UNKNOWN, mentors, run.method, epochs]


def _plots(entries: Sequence[_Entry], groups: Sequence[Sequence[_Entry]]) -> list[Plot]:
    several_sets = len({entry.data for entry in entries}) > 1

    def called(entry: _Entry, ending: str = "") -> str:
        return entry.name + ending + f" on {entry.data}" * several_sets

    drawn = []
    traces = [
        curve(
            records,
            lambda record: record.get("test_top1"),
            called(entry, ending * (entry.run.method != "alone")),
            {"color": entry.colour, "width": width, "dash": dash},
            entry.marker,
        )
        for entry in entries
        for phase, ending, width, dash in (
            ("classroom", "", 2.5, "solid"),
            ("alone", " alone", 1.5, "dash"),
        )
        if (records := entry.run.student_curve(phase))
    ]
    note = (
        "Share of the held-out images whose most probable class is the true one: taught by "
        "mentors solid, alone dashed."
    )
    if 1 < len(groups) <= len(COLOURS):
        note += " Runs in one colour differ in the seed only."
    if traces:
        drawn.append(
            Plot(
                "accuracy",
                "Held-out accuracy of the students",
                note,
                over_epochs(traces, {"title": "held-out top-1 (%)", "tickformat": ".2~%"}),
                wide=True,
            )
        )
    mentors = list(dict.fromkeys(name for entry in entries for name in entry.run.mentors))
    for number, entry in enumerate(entries, start=1):
        for plot in lessons(entry.run, mentors, ("active_share", "temperature")):
            heading = f"{plot.heading}: {called(entry)}"
            drawn.append(replace(plot, id=f"{plot.id}-{number}", heading=heading))
    for number, group in enumerate(groups, start=1):
        seeds = _seeds(group) or group[:1]
        seeds = [entry for entry in seeds if gains(entry.run, entry.alone)]
        if seeds and (plot := gain_plot([(entry.run, entry.alone) for entry in seeds])):
            others = f" and {counted(len(seeds) - 1, 'other seed')}" if len(seeds) > 1 else ""
            heading = f"{plot.heading}: {called(seeds[0])}{others}"
            drawn.append(replace(plot, id=f"{plot.id}-{number}", heading=heading))
    return drawn
