"""The runs of a comparison: their names, colours and groups."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from classroomkd.report.axes import ALONE, COLOURS, MARKERS
from classroomkd.report.differences import recipe, what_differs
from classroomkd.report.numbers import UNKNOWN, counted
from classroomkd.report.records import RunRecords
from classroomkd.runs.identity import marks
from classroomkd.runs.recipe import Recipe

TEST = "the test images"  # in a run's digests
_LABEL = 60  # characters that fit into a legend


@dataclass(frozen=True)
class Entry:
    """A run in the comparison.

    ``data`` is the unique name of its data set. ``alone`` is the run that trained the student
    alone: this one or another one with the same seed and recipe except for the distillation, for
    which ``student`` is equal. ``group`` is equal for runs that differ only in the seed, and
    ``differs`` says how the configuration differs from that of the other runs.
    """

    run: RunRecords
    name: str
    data: str
    alone: RunRecords
    student: str
    group: str
    differs: str
    colour: str
    marker: str

    @property
    def seed(self) -> str:
        """The seed as printed."""
        return UNKNOWN if (seed := self.run.fact("seed")) is None else str(seed)

    def numbers(self) -> tuple[float | None, float | None, float | None]:
        """Top-1 of the last epoch, of the best epoch, and of the student alone in its last epoch.

        Each is None until the training has finished, and the last for a run of method "alone".
        """
        taught = "alone" if self.run.method == "alone" else "student"
        last, alone = _last(self.run, taught), _last(self.alone, "alone")
        best = self.run.result(taught).get("best_test_top1")
        if best is None and last is not None:
            curve = self.run.student_curve(taught)
            known = (r["test_top1"] for r in curve if r.get("test_top1") is not None)
            best = max(known, default=None)
        return last, best, None if taught == "alone" else alone


def _last(run: RunRecords, phase: str) -> float | None:
    if result := run.result(phase):
        return result.get("top1")
    *_, last = run.student_curve(phase) or [{}]
    return last.get("test_top1") if last and last["epoch"] == last.get("epochs") else None


def _recipe(run: RunRecords, data: str, alone: bool = False) -> str | None:
    """A key that is equal for runs that differ only in the seed; None without a configuration.

    With ``alone``, it is equal for runs that train the same student alone.
    """
    if not run.settings:
        return None
    teaching = {key for key, mark in marks(Recipe).items() if mark == "teaching" and alone}
    rest = {key: v for key, v in recipe(run).items() if key.split(".")[0] not in teaching}
    return json.dumps([data, rest], sort_keys=True)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The shortest unique trailing part of each path, which are absolute and distinct."""
    parts = [path.parts for path in paths]

    def shortest(own: tuple[str, ...]) -> str:
        endings = (own[-count:] for count in range(1, len(own) + 1))
        unique = (e for e in endings if sum(other[-len(e) :] == e for other in parts) == 1)
        return str(Path(*next(unique)))

    return [shortest(own) for own in parts]


def entries_of(runs: Sequence[RunRecords]) -> list[Entry]:
    """The entries of a comparison of ``runs``."""
    names = unique_names([_absolute(run.folder) for run in runs])
    # Data sets are identified by path; those with the same held-out images are the same.
    seen: dict[str, Path] = {}
    places = []
    for run in runs:
        place = _absolute(run.source or run.data or "unknown")
        places.append(seen.setdefault(run.digests.get(TEST) or str(place), place))
    distinct = list(dict.fromkeys(places))
    data_names = dict(zip(distinct, unique_names(distinct), strict=True))
    data = [data_names[place] for place in places]
    recipes = [_recipe(run, of) or name for run, of, name in zip(runs, data, names, strict=True)]
    kinds = list(dict.fromkeys(recipes))

    # As in the tables of `classroomkd reproduce`, runs are paired by seed.
    students = [
        (_recipe(run, name, alone=True), tuple(sorted(run.digests.items())), str(run.fact("seed")))
        for run, name in zip(runs, data, strict=True)
    ]
    alone = {
        student: run
        for student, run in reversed(list(zip(students, runs, strict=True)))
        if student[0] and _last(run, "alone") is not None
    }
    differs = what_differs(runs)
    return [
        Entry(
            run,
            names[number],
            data[number],
            run if run.student_curve("alone") else alone.get(students[number], run),
            students[number][0] or names[number],
            recipes[number],
            differs[number],
            ALONE if run.method == "alone" else COLOURS[kind % len(COLOURS)],
            MARKERS[kind % len(MARKERS)],
        )
        for number, (run, kind) in enumerate(zip(runs, map(kinds.index, recipes), strict=True))
    ]


def _absolute(path: Path | str) -> Path:
    return Path(os.path.abspath(path))  # links are not resolved, so that their names are shown


def by_recipe(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The runs grouped by recipe, in the order of their first runs."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return list(groups.values())


def finished_seeds(group: Sequence[Entry]) -> list[Entry]:
    """The finished runs of a group, one per seed."""
    seeds: dict[str, Entry] = {}
    for entry in group:
        if entry.run.summary is not None:
            seeds.setdefault(entry.seed, entry)
    return list(seeds.values())


def curve_groups(group: Sequence[Entry]) -> list[list[Entry]]:
    """Runs to draw as one curve: the finished runs of the seeds, and each other run separately."""
    unfinished = [[entry] for entry in group if entry.run.summary is None]
    return list(filter(None, [finished_seeds(group), *unfinished]))


def called(group: Sequence[Entry]) -> str:
    """The name of a group: the folder of a single run, else a short difference from other recipes.

    If there is no short difference, the name of the first folder and the number of other seeds.
    """
    first = group[0]
    if len(group) == 1:
        return first.name
    if first.differs and len(first.differs) <= _LABEL:
        return f"{first.differs} ({len(group)} seeds)"
    return f"{first.name} and {counted(len(group) - 1, 'other seed')}"
