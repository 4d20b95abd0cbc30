"""Runs that are compared: what they are called and drawn in, and which belong together."""

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


_LABEL = 60  # characters that a legend has room for


@dataclass(frozen=True)
class Entry:
    """A run in the comparison.

    ``data`` is the name of its data set, unique among those. The student was trained ``alone`` in
    this run or, if not, in another one of the same seed and recipe, the teaching apart: ``student``
    is equal in runs where that recipe is. ``group`` is equal in runs that differ in their seed
    only, and ``differs`` says how the run's configuration differs from the others'.
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
        """As the page says it."""
        return UNKNOWN if (seed := self.run.fact("seed")) is None else str(seed)

    def numbers(self) -> tuple[float | None, float | None, float | None]:
        """Top-1 of the last epoch, of the best, and of the student alone after its last.

        None what is not known before the end of a training; the last also where it is the first.
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
    """Equal in runs that differ in their seed only; None if the configuration is not known.

    With ``alone`` it is equal also in runs whose student, trained alone, is the same.
    """
    if not run.settings:
        return None
    teaching = {key for key, mark in marks(Recipe).items() if mark == "teaching" and alone}
    rest = {key: v for key, v in recipe(run).items() if key.split(".")[0] not in teaching}
    return json.dumps([data, rest], sort_keys=True)


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


def entries_of(runs: Sequence[RunRecords]) -> list[Entry]:
    """What each run is in their comparison."""
    names = unique_names([_absolute(run.folder) for run in runs])
    # A data set is where it lies, or the same as another if it has the same held-out images.
    seen: dict[str, Path] = {}
    places = []
    for run in runs:
        place = _absolute(run.source or run.data or "unknown")
        places.append(seen.setdefault(run.digests.get(TEST) or str(place), place))
    distinct = list(dict.fromkeys(places))
    words = dict(zip(distinct, unique_names(distinct), strict=True))
    data = [words[place] for place in places]
    recipes = [_recipe(run, of) or name for run, of, name in zip(runs, data, names, strict=True)]
    kinds = list(dict.fromkeys(recipes))

    # As the tables of `classroomkd reproduce` do, a run is compared with that of its own seed.
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
            _colour(run, kinds.index(recipes[number])),
            MARKERS[kinds.index(recipes[number]) % len(MARKERS)],
        )
        for number, run in enumerate(runs)
    ]


def _colour(run: RunRecords, number: int) -> str:
    return ALONE if run.method == "alone" else COLOURS[number % len(COLOURS)]


def _absolute(path: Path | str) -> Path:
    return Path(os.path.abspath(path))  # not resolved: a link's own name is what people gave it


def by_recipe(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The runs of one recipe together, in the order of the first ones."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return list(groups.values())


def finished_seeds(group: Sequence[Entry]) -> list[Entry]:
    """The finished runs of a group, one for each seed."""
    seeds: dict[str, Entry] = {}
    for entry in group:
        if entry.run.summary is not None:
            seeds.setdefault(entry.seed, entry)
    return list(seeds.values())


def courses(group: Sequence[Entry]) -> list[list[Entry]]:
    """What is drawn as one curve: the finished runs of the seeds, and each other run by itself."""
    unfinished = [[entry] for entry in group if entry.run.summary is None]
    return list(filter(None, [finished_seeds(group), *unfinished]))


def called(group: Sequence[Entry]) -> str:
    """What runs of one recipe are called together: what differs from other recipes, if it is short.

    A run by itself has its folder's name, and so have the seeds of the only recipe.
    """
    first = group[0]
    if len(group) == 1:
        return first.name
    if first.differs and len(first.differs) <= _LABEL:
        return f"{first.differs} ({len(group)} seeds)"
    return f"{first.name} and {counted(len(group) - 1, 'other seed')}"
