"""Read the records in a run folder, finished or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from classroomkd.errors import UserError
from classroomkd.models import network_names
from classroomkd.runs.old_runs import current_record


@dataclass(frozen=True)
class RunRecords:
    """The records of one run, from its ``folder``.

    ``config`` is the text of config.yaml, or empty. ``digests`` identify the images of each part;
    old runs have none. ``curves`` maps (phase, name) to the network's epochs in order: mentors
    first, then the student alone, then the student with mentors. ``summary`` is None until the run
    has finished. ``unreadable`` are the numbers, from 1, of the lines of metrics.jsonl that are not
    records. ``starts`` has an entry for each process that worked on the run; old runs have none.
    """

    folder: Path
    config: str
    digests: Mapping[str, str]
    summary: dict | None
    curves: dict[tuple[str, str], list[dict]]
    unreadable: list[int]
    starts: list[dict]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration's values; empty if it is missing or damaged."""
        values = None
        with suppress(yaml.YAMLError):
            values = yaml.safe_load(self.config)
        return values if isinstance(values, dict) else {}

    @property
    def results(self) -> list[dict[str, Any]]:
        """The summary's results; empty until the run has finished."""
        return self.summary["results"] if self.summary else []

    @property
    def data(self) -> str | None:
        """The name of the data set."""
        if self.summary:
            return self.summary["data"]["name"]
        return Path(self.source).name if self.source else None

    @property
    def source(self) -> str | None:
        """The data source in the configuration."""
        data = self.settings.get("data")
        source = data.get("source") if isinstance(data, dict) else data
        return str(source) if source else None

    @property
    def student(self) -> str | None:
        """The student's name."""
        named = [name for phase, name in self.curves if phase != "mentor"]
        configured = network_names.label(str(self.settings.get("student") or "")) or None
        return self.result("student").get("name") or next(iter(named), configured)

    @property
    def code(self) -> dict[str, str]:
        """The first digits of the SHA-256 of each file that defines a network."""
        student = self.settings.get("student")
        return {
            "student_code" if name == student else f"mentors.{network_names.label(name)}": digest[
                :12
            ]
            for name, digest in _inputs(self.folder).items()
            if network_names.is_code(name)
        }

    @property
    def epochs(self) -> int | None:
        """Epochs of the student's schedule, or of the mentors' in a run without a student."""
        training = self.settings.get("training" if self.student else "mentor_training")
        known = [records[-1].get("epochs") for records in self.curves.values()]
        own = training.get("epochs") if isinstance(training, dict) else None
        return own or next(reversed(known), None)

    @property
    def method(self) -> str:
        """The student's method; old runs without one are classrooms."""
        return self.fact("method") or "classroom"

    def fact(self, key: str) -> Any:
        """The run's seed or device; for a finished run, the device that was used."""
        return (self.summary or self.settings).get(key)

    def result(self, phase: str) -> dict[str, Any]:
        """The student's result in ``phase``; empty until the run has finished."""
        return next((result for result in self.results if result["phase"] == phase), {})

    def student_curve(self, phase: str) -> list[dict]:
        """The epochs of the student in ``phase``, "alone" or "student"."""
        return next((records for (of, _), records in self.curves.items() if of == phase), [])

    def seconds(self, mentors: bool) -> float:
        """The total time of the epochs of the student, or of the mentors trained here."""
        reused = {result["name"] for result in self.results if result.get("reused")}
        return sum(
            record.get("seconds") or 0.0
            for (phase, name), records in self.curves.items()
            if (phase == "mentor") == mentors and not (mentors and name in reused)
            for record in records
        )

    @property
    def classroom(self) -> list[dict]:
        """The epochs of the student with mentors."""
        return self.student_curve("student")

    @property
    def mentors(self) -> list[str]:
        """The names of the mentors, trained here or given, in a fixed order."""
        listed = [result["name"] for result in self.results if result["phase"] == "mentor"]
        trained = [name for phase, name in self.curves if phase == "mentor"]
        teaching = [name for record in self.classroom for name in record.get("mentors") or {}]
        return list(dict.fromkeys([*listed, *teaching, *trained]))


def incomplete(run: RunRecords) -> str:
    """A message that lists the ``unreadable`` lines of a run's metrics.jsonl."""
    lines = "line" if len(run.unreadable) == 1 else "lines"
    numbers = ", ".join(map(str, run.unreadable))
    return f"Skipped incomplete {lines} {numbers} of metrics.jsonl"


def at_chance(run: RunRecords) -> list[str]:
    """A line for each network whose training top-1 was at chance in some epochs."""
    lines = []
    for key, records in run.curves.items():
        if epochs := [record["epoch"] for record in records if "chance_top1" in record]:
            lines.append(
                f"{label(*key, run.method)}: training top-1 at chance in {len(epochs)} of "
                f"{len(records)} epochs, first in epoch {epochs[0]}"
            )
    return lines


def label(phase: str, name: str, method: str = "classroom") -> str:
    """The name of a network in tables and legends; ``method`` is that of the student."""
    taught = " in the classroom" if method == "classroom" else f" by {method}"
    return name + {"mentor": " (mentor)", "alone": " alone"}.get(phase, taught)


def require_records(folder: Path) -> None:
    """Raise UserError if there is no ``folder`` or it holds no metrics.jsonl."""
    if not folder.is_dir():
        raise UserError(f"no run folder at {folder}: give the folder of a training run")
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"no metrics.jsonl in {folder}: give the folder of a training run")


def read_run(folder: Path) -> RunRecords:
    """Read ``folder``; raises UserError if its records or summary cannot be read."""
    folder = Path(folder)
    require_records(folder)
    summary, config = folder / "summary.json", folder / "config.yaml"
    try:
        finished = _summary(summary) if summary.is_file() else None
        curves, unreadable = _read_metrics(folder / "metrics.jsonl")
        text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
        starts = _starts(folder / "starts.jsonl")
        digests = {k: v for k, v in _inputs(folder).items() if k.endswith(" images")}
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; make it readable to report the run"
        ) from None
    return RunRecords(folder, text, digests, finished, curves, unreadable, starts)


def _summary(path: Path) -> dict:
    """A finished run's summary; raises UserError if the report cannot use it."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}): delete it to report the run without it"
        ) from None
    try:
        data, results = found["data"], found["results"]
        fine = (
            isinstance(data["name"], str)
            and all(isinstance(data[key], int) for key in ("classes", "test_images"))
            and data["test_images"] > 0
            and isinstance(results, list)
            and all({"phase", "name", "epochs"} <= result.keys() for result in results)
            and not any(isinstance(result.get("top1"), str) for result in results)
        )
    except (AttributeError, KeyError, TypeError):
        fine = False
    if not fine:
        raise UserError(f"{path} is not a run's summary: delete it to report the run without it")
    return found | {"results": [current_record(result) for result in results]}


def _inputs(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, AttributeError):
        return dict(json.loads((folder / "inputs.json").read_bytes()).items())
    return {}


def _starts(path: Path) -> list[dict]:
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):  # a killed run may leave half a line
            found.append(json.loads(line))
    return [start for start in found if isinstance(start, dict)]


def _require_epoch(record: Any) -> None:
    """Raise KeyError or TypeError unless ``record`` is that of an epoch."""
    texts = {name for name, value in record.items() if isinstance(value, str)}
    mentors = record.get("mentors") or {}
    if (
        texts != {"phase", "name"}
        or not isinstance(record["epoch"], int)
        or not all(isinstance(of, dict) for of in mentors.values())
    ):
        raise TypeError


def _read_metrics(path: Path) -> tuple[dict[tuple[str, str], list[dict]], list[int]]:
    epochs: dict[tuple[str, str], dict[int, dict]] = {}
    unreadable = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line, parse_constant=lambda _: None)  # NaN and Infinity become gaps
            _require_epoch(record)
            record = current_record(record)
            # A resumed run may record an epoch again that was not saved: the last record counts.
            epochs.setdefault((record["phase"], record["name"]), {})[record["epoch"]] = record
        except (ValueError, AttributeError, KeyError, TypeError):  # such as half a line
            unreadable.append(number)
    curves = {
        key: [by_epoch[epoch] for epoch in sorted(by_epoch)]
        for phase in ("mentor", "alone", "student")
        for key, by_epoch in epochs.items()
        if key[0] == phase
    }
    return curves, unreadable
