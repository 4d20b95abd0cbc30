"""What a page that compares runs says: its table, its warnings, its plots."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import mean, stdev

from classroomkd.report.classes import gain_plot
from classroomkd.report.document import sections, swatch, table, warning
from classroomkd.report.figures import COLOURS, MARKERS, Plot, curve, over_epochs
from classroomkd.report.plots import lessons
from classroomkd.report.records import Run

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
)


@dataclass(frozen=True)
class _Entry:
    """A run in the comparison; ``data`` is the name of its data set, unique among those."""

    run: Run
    name: str
    data: str
    colour: str
    marker: str

    def numbers(self) -> tuple[float | None, ...]:
        """Top-1 of the last epoch, of the best, of the student alone, and the gain over it.

        None what is not known before the end of a training.
        """
        taught = "alone" if self.run.method == "alone" else "classroom"
        last, alone = (self._last(phase) for phase in (taught, "alone"))
        best = self.run.result(taught).get("best_test_top1")
        if best is None and last is not None:
            curve = self.run.student_curve(taught)
            known = (r["test_top1"] for r in curve if r.get("test_top1") is not None)
            best = max(known, default=None)
        gain = None if taught == "alone" or None in (last, alone) else last - alone
        return last, best, alone, gain

    def _last(self, phase: str) -> float | None:
        if result := self.run.result(phase):
            return result.get("top1")
        *_, last = self.run.student_curve(phase) or [{}]
        return last.get("test_top1") if last and last["epoch"] == last.get("epochs") else None

    def recipe(self) -> str | None:
        """Equal in runs that differ in their seed only; None if the configuration is not known."""
        settings = self.run.settings
        if not settings:
            return None
        rest = {key: value for key, value in settings.items() if key not in _NOT_RECIPE}
        if isinstance(settings.get("data"), dict):
            rest["data"] = settings["data"] | {"source": None, "loader": None}
        kind = str(settings.get("device")).split(":")[0]  # cuda:0 and cuda:1 do the same
        return json.dumps([self.data, kind, rest], sort_keys=True, default=str)


def comparison(runs: Sequence[Run]) -> tuple[str, str]:
    """The title and the HTML body of the page that compares ``runs``."""
    entries = _entries(runs)
    groups = _groups(entries)
    rows = "".join(_rows(group) for group in groups)
    body = f"""{_warnings(entries)}
{table("runs", COLUMNS, rows)}
<p class="note">top-1 is that of the student, taught by the method, after its last epoch, best the
highest of any epoch on these same held-out images, alone that of the student trained alone, and
gain the first less that, in percentage points; – is not known, or not yet. A mean ± sample standard
deviation goes over the finished runs whose configurations differ in the seed only.</p>
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
        places.append(seen.setdefault(run.test_digest or str(place), place))
    distinct = list(dict.fromkeys(places))
    data = dict(zip(distinct, unique_names(distinct), strict=True))
    return [
        _Entry(
            run,
            name,
            data[place],
            COLOURS[number % len(COLOURS)],
            MARKERS[number % len(MARKERS)],
        )
        for number, (run, name, place) in enumerate(zip(runs, names, places, strict=True))
    ]


def _absolute(path: Path | str) -> Path:
    return Path(os.path.abspath(path))  # not resolved: a link's own name is what people gave it


def _groups(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    """The runs of one recipe together, in the order of the first ones."""
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.recipe() or entry.name, []).append(entry)
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
        digests = {entry.run.test_digest for entry in entries if entry.data == name}
        if len(digests - {None}) > 1:
            lines.append(
                f"The runs on {name} held out different images, as a split by seed does: "
                "their gains compare better than their accuracies."
            )
    for entry in entries:
        if entry.run.summary is None:
            lines.append(f"{entry.name} is unfinished: here is what it has recorded so far.")
        if entry.run.unreadable:
            numbers = ", ".join(map(str, entry.run.unreadable))
            lines.append(
                f"Incomplete and left out: line {numbers} of metrics.jsonl in {entry.name}."
            )
    return "".join(map(warning, lines))


def _rows(group: Sequence[_Entry]) -> str:
    rows = "".join(_row(entry) for entry in group)
    seeds = _seeds(group)
    if len(seeds) > 1:
        columns = list(zip(*(entry.numbers() for entry in seeds), strict=True))
        cells = [f"mean ± deviation, n = {len(seeds)}", *_facts(seeds[0]), ""]
        cells[6] = ", ".join(str(entry.run.fact("seed")) for entry in seeds)
        cells += [_spread(column, ".2f", "%") for column in columns[:3]]
        cells.append(_spread(columns[3], "+.2f"))
        rows += _cells("mean", "", cells)
    return rows


def _spread(values: Sequence[float | None], form: str, unit: str = "") -> str:
    if None in values:
        return "–"
    return f"{100 * mean(values):{form}} ± {100 * stdev(values):.2f}{unit}"


def _row(entry: _Entry) -> str:
    *shares, gain = entry.numbers()
    seed = entry.run.fact("seed")
    cells = [entry.name, *_facts(entry), "–" if seed is None else str(seed)]
    cells += ["–" if share is None else f"{share:.2%}" for share in shares]
    cells.append("–" if gain is None else f"{100 * gain:+.2f}")
    return _cells("run", swatch(entry.colour), cells)


def _facts(entry: _Entry) -> list[str]:
    run = entry.run
    *_, last = run.classroom or run.student_curve("alone") or [{}]
    epochs = f"{last['epoch']}" if last else "–"
    if last and last["epoch"] != last.get("epochs"):
        epochs += f" of {last.get('epochs')}"
    mentors = ", ".join(run.mentors) or "–"
    return [entry.data, run.student or "–", mentors, run.method, epochs]


def _cells(kind: str, before: str, cells: Iterable[str]) -> str:
    tagged = "".join(
        f'<td title="{column}">{before if column == "run" else ""}{escape(cell)}</td>'
        for column, cell in zip(COLUMNS, cells, strict=True)
    )
    return f'<tr class="{kind}">{tagged}</tr>'


def _plots(entries: Sequence[_Entry], groups: Sequence[Sequence[_Entry]]) -> list[Plot]:
    several_sets = len({entry.data for entry in entries}) > 1

    def called(entry: _Entry, ending: str = "") -> str:
        return entry.name + ending + f" on {entry.data}" * several_sets

    drawn = []
    traces = [
        curve(
            records,
            lambda record: record.get("test_top1"),
            called(entry, ending),
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
    if traces:
        drawn.append(
            Plot(
                "accuracy",
                "Held-out accuracy of the students",
                "Share of the held-out images whose most probable class is the true one: taught by "
                "mentors solid, alone dashed.",
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
        if plot := gain_plot([entry.run for entry in seeds]):
            others = f" and {len(seeds) - 1} other seeds" if len(seeds) > 1 else ""
            heading = f"{plot.heading}: {called(seeds[0])}{others}"
            drawn.append(replace(plot, id=f"{plot.id}-{number}", heading=heading))
    return drawn
