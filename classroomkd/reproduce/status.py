"""The progress of a plan's tasks, and the time left."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classroomkd.files import atomic_write
from classroomkd.reproduce.plan import Plan, Task


@dataclass(frozen=True)
class Status:
    """A task's progress: whether it is finished, its epochs, and the seconds spent on it.

    For processes that have ended, the seconds are their whole run time.
    """

    finished: bool
    epochs: int
    seconds: float


def status(task: Task, out: Path) -> Status:
    """The progress of ``task`` in the table's folder ``out``."""
    folder = out / task.id
    lines = own_records(folder, mentors=task.id.startswith("mentors/"))
    seconds = sum(line.get("seconds") or 0.0 for line in lines)
    return Status(is_finished(task, out), len(lines), max(seconds, seconds_waited(task, out)))


def seconds_waited(task: Task, out: Path) -> float:
    """The total run time of the processes of ``task`` that have ended."""
    with suppress(OSError, ValueError):
        return float(_waited(task, out).read_bytes())
    return 0.0


def add_seconds_waited(task: Task, out: Path, seconds: float) -> None:
    """Add the run time of another process of ``task`` that has ended."""
    with suppress(OSError):  # only the estimate depends on it
        atomic_write(_waited(task, out), f"{seconds_waited(task, out) + seconds:.3f}\n")


def forget_seconds_waited(task: Task, out: Path) -> None:
    """Reset the run time of ``task``."""
    _waited(task, out).unlink(missing_ok=True)


def _waited(task: Task, out: Path) -> Path:
    return out / "logs" / f"{task.id}.seconds"


def is_finished(task: Task, out: Path) -> bool:
    """Whether ``task`` is finished."""
    return (out / task.id / "summary.json").exists()


def from_store(task: Task, out: Path) -> bool:
    """Whether the finished ``task`` took everything from the store."""
    with suppress(ValueError):
        results = json.loads((out / task.id / "summary.json").read_bytes())["results"]
        return all(result.get("reused") for result in results)
    return False


def own_records(run: Path, mentors: bool) -> list[dict[str, Any]]:
    """The records in metrics.jsonl of the mentors, or of the student."""
    records = []
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last one may be half written
                if ((record := json.loads(line))["phase"] == "mentor") is mentors:
                    records.append(record)
    return records


def tasks_left(plan: Plan, out: Path) -> list[Task]:
    """The remaining tasks: first the mentors that remaining runs need, then those runs.

    For a plan without runs, all remaining mentors.
    """
    runs = [run for run in plan.runs if not is_finished(run, out)]
    needed = {need for run in runs for need in run.needs}
    if not plan.runs:
        needed = {task.id for task in plan.mentors}
    mentors = [task for task in plan.mentors if task.id in needed and not is_finished(task, out)]
    return mentors + runs


def seconds_left(plan: Plan, out: Path, at_once: int) -> float | None:
    """Estimated seconds for the remaining tasks with ``at_once`` processes in parallel.

    Extrapolated from the seconds spent so far, in proportion to the operations of the networks;
    None before the first epoch.
    """
    states = {task: status(task, out) for task in (*plan.mentors, *plan.runs)}
    done = {task: min(now.epochs / task.epochs, 1.0) for task, now in states.items()}
    left = sum((1 - done[task]) * task.work for task in tasks_left(plan, out))
    if not left:
        return 0.0
    work = sum(share * task.work for task, share in done.items())
    return sum(now.seconds for now in states.values()) / work * left / at_once if work else None
