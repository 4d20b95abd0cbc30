"""A process for each benchmark row, because rows set thread counts, fill memory, hang or abort."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

LONGEST = 300.0  # seconds; a step that takes longer is considered hung


def serve(
    connection: Connection, make: Callable[[], Any], device: torch.device, start_method: str
) -> None:
    """Call the methods named by the main process and send their results, until it disconnects."""
    # Workers are started by the default method, unlike this process.
    multiprocessing.set_start_method(start_method, force=True)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # creates the context, before memory is measured
    served = make()
    connection.send(("ok", None))
    while True:
        try:
            method = connection.recv()
        except EOFError:
            return
        try:
            reply = ("ok", getattr(served, method)())
        except Exception as error:
            reply = (reason(error), None)
        connection.send(reply)


def reason(error: BaseException) -> str:
    """An error in one line, as a row's status; a missing package does not count as a failure."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError):
            return f"not installed: {cause.name}"
        cause = cause.__cause__
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {' '.join(str(error).split())}"


class RowError(Exception):
    """Ends a row; the message is its status."""


class Process:
    """A process that runs `serve` with the object that ``make`` returns.

    The first reply is that of `ready`. No reply may come later than ``ends`` (`time.monotonic`).
    """

    def __init__(self, make: Callable[[], Any], device: torch.device, ends: float) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share this one's memory
        self.connection, theirs = context.Pipe()
        arguments = theirs, make, device, multiprocessing.get_start_method()
        self._process = context.Process(target=serve, args=arguments)
        self._process.start()
        theirs.close()
        self.ends = ends

    def ready(self) -> None:
        """Wait until it has made its object."""
        self._reply(None)

    def ask(self, method: str, memory: list[int] | None = None) -> Any:
        """Call a method; the process's memory meanwhile, in bytes, is appended to ``memory``."""
        self.connection.send(method)
        return self._reply(memory)

    def _reply(self, memory: list[int] | None) -> Any:
        limit = min(LONGEST, self.ends - time.monotonic())
        until = time.monotonic() + limit
        while not self.connection.poll(max(0, limit) if memory is None else 0.02):
            if time.monotonic() >= until:
                out_of_time = limit < LONGEST
                raise RowError(
                    "not run: out of time" if out_of_time else f"failed: no answer in {limit:g} s"
                )
            if memory is not None:
                memory.append(self.memory())
        try:
            status, value = self.connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise RowError(f"failed: its process ended with status {code}") from None
        if status != "ok":
            raise RowError(status)
        if memory is not None:
            memory.append(self.memory())
        return value

    def memory(self) -> int:
        """Bytes held by the process and its workers; shared pages count once.

        File pages are left out, because the system can drop them.
        """
        total, pids = 0, [self._process.pid]
        while pids:
            process = Path("/proc", str(pids.pop()))
            try:
                lines = (process / "smaps_rollup").read_text().splitlines()
                held = [line.split()[1] for line in lines if line.startswith(("Pss_A", "Pss_S"))]
                for thread in (process / "task").iterdir():
                    pids += (thread / "children").read_text().split()
            except OSError:  # the process has just ended, or this is not Linux
                continue
            total += 1024 * sum(map(int, held))
        return total

    def stop(self) -> None:
        """End it; kill it if it does not end within two seconds."""
        self.connection.close()
        self._process.join(2)
        self._process.kill()
        self._process.join()


class ProcessRow:
    """A row of a record, and the process that measures it until a step fails.

    ``make`` returns the object that measures; ``about`` are the record's first entries.
    """

    def __init__(self, make: Callable[[], Any], device: torch.device, **about: Any) -> None:
        self._make, self._device = make, device
        self.process: Process | None = None
        self.record = about | {"status": "not run: out of time", "rounds": []}

    def start(self, ends: float) -> None:
        """Start the process, which must finish all its work by ``ends``."""
        self.process = Process(self._make, self._device, ends)

    def attempt(self, step: Callable[[], None]) -> None:
        """Call ``step`` if there is a process; a failure becomes the row's status and ends it."""
        if self.process is None:
            return
        try:
            step()
        except RowError as failure:
            self.record["status"] = str(failure)
            self.stop()

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.stop()
        self.process = None


def stop_all(rows: Sequence[ProcessRow]) -> None:
    """End the processes of all rows, in parallel."""
    for row in rows:
        if row.process is not None:
            row.process.connection.close()
    for row in rows:
        row.stop()
