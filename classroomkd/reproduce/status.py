"""How far the tasks of a plan are, and how long the rest will take."""

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
    """How far a task is: whether it is finished, its epochs and the seconds that they took.

    Those of processes that have ended count from their start to their end.
    """

    finished: bool
    epochs: int
    seconds: float


def status(task: Task, out: Path) -> Status:
    """How far ``task`` is in the table's folder ``out``."""
    folder = out / task.id
    lines = own_records(folder, mentors=task.id.startswith("mentors/"))
    seconds = sum(line.get("seconds") or 0.0 for line in lines)
    return Status(is_finished(task, out), len(lines), max(seconds, seconds_waited(task, out)))


def seconds_waited(task: Task, out: Path) -> float:
    """How long the processes of ``task`` took that have ended here."""
    with suppress(OSError, ValueError):
        return float(_waited(task, out).read_bytes())
    return 0.0


def add_seconds_waited(task: Task, out: Path, seconds: float) -> None:
    """Note that another process of ``task`` has ended, after ``seconds``."""
    with suppress(OSError):  # that it cannot be noted is no matter
        atomic_write(_waited(task, out), f"{seconds_waited(task, out) + seconds:.3f}\n")


def forget_seconds_waited(task: Task, out: Path) -> None:
    """Begin to count anew."""
    _waited(task, out).unlink(missing_ok=True)


def _waited(task: Task, out: Path) -> Path:
    return out / "logs" / f"{task.id}.seconds"


def is_finished(task: Task, out: Path) -> bool:
    """Whether all of ``task`` is done."""
    return (out / task.id / "summary.json").exists()


def from_store(task: Task, out: Path) -> bool:
    """Whether nothing of the finished ``task`` had to be trained."""
    with suppress(ValueError):
        results = json.loads((out / task.id / "summary.json").read_bytes())["results"]
        return all(result.get("reused") for result in results)
    return False


def own_records(run: Path, mentors: bool) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are of the mentors, or those that are of the student."""
    records = []
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last one may be half written
                if ((record := json.loads(line))["phase"] == "mentor") is mentors:
                    records.append(record)
    return records


def tasks_left(plan: Plan, out: Path) -> list[Task]:
    """What is still to be done: mentors that runs left over need, then those runs.

    Of a plan without runs, all mentors.
    """
    runs = [run for run in plan.runs if not is_finished(run, out)]
    needed = {need for run in runs for need in run.needs}
    if not plan.runs:
        needed = {task.id for task in plan.mentors}
    mentors = [task for task in plan.mentors if task.id in needed and not is_finished(task, out)]
    return mentors + runs


def seconds_left(plan: Plan, out: Path, at_once: int) -> float | None:
    """The time that what is left takes if ``at_once`` tasks run side by side, each as until now.

    It follows from the seconds that the tasks took until now and the operations of the networks;
    None before the first epoch.
    """
    states = {task: status(task, out) for task in (*plan.mentors, *plan.runs)}
    done = {task: min(now.epochs / task.epochs, 1.0) for task, now in states.items()}
    left = sum((1 - done[task]) * task.work for task in tasks_left(plan, out))
    if not left:
        return 0.0
    work = sum(share * task.work for task, share in done.items())
    return sum(now.seconds for now in states.values()) / work * left / at_once if work else None
