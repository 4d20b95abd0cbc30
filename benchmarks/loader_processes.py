"""Processes of their own for things that set thread counts, fill memory, hang or abort."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

LONGEST = 300.0  # seconds; a step that takes longer hangs


def serve(
    connection: Connection, make: Callable[[], Any], device: torch.device, start_method: str
) -> None:
    """Call the methods that the main process names and send what they return, until it is gone."""
    # Workers are started as they are by default, not as this process was.
    multiprocessing.set_start_method(start_method, force=True)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context, before memory is looked at
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
    """In one line; a package that is not there is no failure."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError):
            return f"not installed: {cause.name}"
        cause = cause.__cause__
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {' '.join(str(error).split())}"


class RowError(Exception):
    """A row's end; the message is its status."""


class Process:
    """A process that serves; the first thing to be had from it is that it is `ready`."""

    def __init__(self, make: Callable[[], Any], device: torch.device, ends: float) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share this one's memory
        self.connection, theirs = context.Pipe()
        arguments = theirs, make, device, multiprocessing.get_start_method()
        self._process = context.Process(target=serve, args=arguments)
        self._process.start()
        theirs.close()
        self.ends = ends

    def ready(self) -> None:
        """Wait until it has imported what all rows have in common."""
        self._reply(None)

    def ask(self, method: str, memory: list[int] | None = None) -> Any:
        """What a method returns; into ``memory`` goes what the process holds meanwhile."""
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
        """Bytes that the process and its workers hold; pages that several share count once.

        Pages of files are left out, as the system drops them when it needs the space.
        """
        total, pids = 0, [self._process.pid]
        while pids:
            process = Path("/proc", str(pids.pop()))
            try:
                lines = (process / "smaps_rollup").read_text().splitlines()
                held = [line.split()[1] for line in lines if line.startswith(("Pss_A", "Pss_S"))]
                for thread in (process / "task").iterdir():
                    pids += (thread / "children").read_text().split()
            except OSError:  # it has just ended, or this is not Linux
                continue
            total += 1024 * sum(map(int, held))
        return total

    def stop(self) -> None:
        """End it, at once if it does not end by itself."""
        self.connection.close()
        self._process.join(2)
        self._process.kill()
        self._process.join()
