"""Run the tasks of a plan as processes, several in parallel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from classroomkd.errors import UserError
from classroomkd.files import lock
from classroomkd.report.numbers import duration
from classroomkd.reproduce.plan import Plan, Task
from classroomkd.reproduce.status import (
    add_seconds_waited,
    forget_seconds_waited,
    from_store,
    is_finished,
    seconds_left,
    seconds_waited,
    status,
    tasks_left,
)
from classroomkd.runs.interrupts import Interrupted, Interrupts
from classroomkd.runs.progress import print_line

_POLL_SECONDS = 0.5
_TAIL = 15  # lines of a failed run's output


@dataclass
class _Running:
    task: Task
    slot: int
    process: subprocess.Popen
    log: Path
    log_begin: int
    begun_at: float
    shown: TaskID


class Runner:
    """Runs the remaining tasks of a plan in the folder ``out``, one process per task.

    Args:
        plan: runs start in its order, each after the mentors that it needs.
        out: receives the run folders, and the output of the processes under logs/.
        devices: torch device names, with one process at a time on each entry.
        console: for progress and failures.

    """

    def __init__(self, plan: Plan, out: Path, devices: Sequence[str], console: Console) -> None:
        self.out, self.devices, self.console = out, devices, console
        self.failed: list[Task] = []
        self._plan = plan
        self._waiting = tasks_left(plan, out)
        self._running: list[_Running] = []
        self._estimated_at = 0.0

    def run(self) -> None:
        """Run all tasks that can be run.

        On SIGINT and SIGTERM, raises KeyboardInterrupt after the processes have saved their
        training states and ended.
        """
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[what]}"),
            console=self.console,
            expand=True,
            transient=True,
            disable=not self.console.is_terminal,  # it would print an empty line
        )
        with Interrupts() as interrupts, self._progress:
            total = self._progress.add_task("all", total=len(self._waiting), what="")
            try:
                while self._running or self._waiting:
                    self._reap()
                    if interrupts.received is not None:
                        break
                    self._start_all()
                    self._show(total)
                    if not self._running:
                        break
                    time.sleep(_POLL_SECONDS)
                if interrupts.received is not None:
                    for running in self._running:
                        running.process.send_signal(interrupts.received)
                for running in self._running:
                    running.process.wait()
                    self._note_time(running)
            finally:  # after a second signal, kill them
                for running in self._running:
                    running.process.kill()
                    running.process.wait()
        if interrupts.received is not None:
            raise Interrupted(interrupts.received)

    def _start_all(self) -> None:
        """Start a task on every free device, as long as one can start."""
        for slot in range(len(self.devices)):
            if any(running.slot == slot for running in self._running):
                continue
            unmet = {task.id for task in self._waiting} | {r.task.id for r in self._running}
            broken = {task.id for task in self.failed}
            for task in list(self._waiting):
                if missing := broken.intersection(task.needs):
                    self._waiting.remove(task)
                    self.failed.append(task)
                    self._print(f"skipped: {task.id}, which needs {', '.join(sorted(missing))}")
                elif not unmet.intersection(task.needs):
                    self._waiting.remove(task)
                    if _is_locked(self.out / task.id):
                        self._print(f"another process is running {task.id}")
                        continue
                    self._start(task, slot)
                    break

    def _start(self, task: Task, slot: int) -> None:
        folder, environment = self.out / task.id, os.environ.copy()
        kind, _, number = self.devices[slot].partition(":")
        if (folder / "config.yaml").exists():
            arguments = ["train", "--resume", str(folder)]
        else:
            if folder.exists():  # killed before it had written its first file
                shutil.rmtree(folder)
            forget_seconds_waited(task, self.out)
            arguments = [*task.arguments, f"device={kind}", "--out", str(folder)]
        if kind == "cuda" and number:
            # The run does not see the number, so it can be resumed on another GPU.
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            number = visible.split(",")[int(number)] if visible else number
            environment["CUDA_VISIBLE_DEVICES"] = number
        log = self.out / "logs" / f"{task.id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            log_begin = output.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "classroomkd", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # so that Ctrl-C reaches it only through this process
            )
        shown = self._progress.add_task(task.id, total=task.epochs, what="epochs")
        begun_at = time.monotonic()
        self._running.append(_Running(task, slot, process, log, log_begin, begun_at, shown))

    def _reap(self) -> None:
        """Record the processes that have ended."""
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            self._progress.remove_task(running.shown)
            self._note_time(running)
            task = running.task
            if code == 0 and is_finished(task, self.out):
                done = "from the store" if from_store(task, self.out) else "done"
                self._print(f"{done}: {task.id}, {duration(seconds_waited(task, self.out))}")
                continue
            self.failed.append(task)
            with running.log.open("rb") as log:
                log.seek(running.log_begin)
                lines = log.read().decode(errors="replace").splitlines()
            self._print(f"failed: {task.id}, status {code}; the end of {running.log}:")
            for line in lines[-_TAIL:]:
                self._print(f"  {line}")

    def _note_time(self, running: _Running) -> None:
        add_seconds_waited(running.task, self.out, time.monotonic() - running.begun_at)

    def _show(self, total: TaskID) -> None:
        for running in self._running:
            epochs = status(running.task, self.out).epochs
            self._progress.update(running.shown, completed=epochs)
        if time.monotonic() - self._estimated_at > 10:  # the estimate reads all records
            self._estimated_at = time.monotonic()
            left = duration(seconds_left(self._plan, self.out, len(self.devices)))
            self._progress.update(total, what=f"runs; left: {left}")
        ended = (self._progress.tasks[0].total or 0) - len(self._waiting) - len(self._running)
        self._progress.update(total, completed=ended)

    def _print(self, line: str) -> None:
        print_line(self._progress.console, line)


def check_devices(devices: Sequence[str]) -> None:
    """Raise UserError for a missing device, or for devices of different kinds.

    CPUs and GPUs round differently, so their results and mentors differ.
    """
    for name in devices:
        kind, colon, number = name.partition(":")
        count = int(kind == "cpu")
        if kind == "cuda":
            import torch

            count = torch.cuda.device_count()
        if not count or (colon and not (number.isdecimal() and int(number) < count)):
            raise UserError(f"there is no device {name!r}: choose another for --devices")
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise UserError(
            f"--devices {' '.join(devices)} are of two kinds, which round differently: choose one"
        )


def _is_locked(run: Path) -> bool:
    if not (run / "config.yaml").exists():
        return False
    try:
        lock(run / "config.yaml", 0).release()
    except Timeout:
        return True
    return False
