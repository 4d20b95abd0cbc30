"""How the configurations of runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from classroomkd.report.records import RunRecords
from classroomkd.runs.identity import marks
from classroomkd.runs.recipe import Recipe


def recipe(run: RunRecords) -> dict[str, str]:
    """The values that determine a run, except its seed and the path of its data, by dotted name.

    Without a configuration, they come from the records.
    """
    known = marks(Recipe) | {"data": "place"}  # if "data" is a string, it is the source
    values = {
        key: value
        for key, value in _flat(run.settings).items()
        if known.get(key, "recipe") in ("recipe", "teaching")
    }
    if device := run.settings.get("device"):
        values["device"] = str(device).split(":")[0]  # cuda:0 and cuda:1 do the same
    values |= run.code  # users' files, which may change under their names
    recorded = {"student": run.student, "method": run.method, "mentors": ", ".join(run.mentors)}
    return {key: str(value) for key, value in recorded.items() if value} | values


def what_differs(runs: Sequence[RunRecords]) -> list[str]:
    """For each run, the values of its recipe that differ among the runs.

    If the runs have the same recipe and seed, any other value of the configuration that differs.
    """
    differing = _differing([recipe(run) for run in runs])
    if not any(differing) and len({str(run.fact("seed")) for run in runs}) == 1:
        differing = _differing([_flat(run.settings) for run in runs])
    return differing


def _differing(values: Sequence[Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for of_run in values for key in of_run)
    differing = [key for key in keys if len({of_run.get(key, "null") for of_run in values}) > 1]
    return [
        ", ".join(f"{key}={of_run[key]}" for key in differing if key in of_run) for of_run in values
    ]


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    values: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{above}{key}.")
        else:
            values[f"{above}{key}"] = _text(value)
    return values


def _text(value: Any) -> str:
    """The value roughly as an override on the command line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):  # a mentor
        more = [
            f"{key}: {_text(v)}" for key, v in value.items() if key != "source" and v is not None
        ]
        source = str(value.get("source", ""))
        return " ".join([source, *([f"({', '.join(more)})"] if more else [])])
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
