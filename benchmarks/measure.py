"""Timing, memory, environment and records, shared by the benchmarks.

Times are in seconds, medians over repeats. Inputs rotate over enough sets that none is still in the
GPU's L2 cache when it is used again.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import classroomkd
from classroomkd.files import atomic_write

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

Call = Callable[..., object]
Sets = Sequence[tuple]


def n_cold_sets(n_bytes: int) -> int:
    """The number of input sets of ``n_bytes`` that fill the L2 cache twice."""
    if not GPU:
        return 1
    return max(1, math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / n_bytes))


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if GPU:
        torch.cuda.synchronize()


def graph_time(call: Call, sets: Sets, repeats: int = 10) -> float:
    """Device time of one call: replays of a CUDA graph of calls over all sets.

    Starting a replay costs microseconds, so each timing takes as many replays as fill 2 ms.
    """
    calls = list(sets) * math.ceil(4 / len(sets))
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # The outer `stream` restores the current stream even if the capture fails.
    with torch.cuda.stream(side):
        for _ in range(3):  # a capture must not compile or load
            call(*sets[0])
        with torch.cuda.graph(graph, stream=side):
            for arguments in calls:  # results are dropped at once: calls share their memory
                call(*arguments)
        _event_seconds(graph.replay, 1)
        n_replays = math.ceil(2e-3 / _event_seconds(graph.replay, 1))
        seconds = [_event_seconds(graph.replay, n_replays) / n_replays for _ in range(repeats)]
    torch.cuda.current_stream().wait_stream(side)
    return statistics.median(seconds) / len(calls)


def _event_seconds(work: Callable[[], object], times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def profiler_time(call: Call, sets: Sets, n_calls: int = 20) -> float:
    """Device time of a call that no graph can capture: the sum over its kernels and copies.

    The gaps between them are left out, which favours what is measured.
    """
    # Restarting the profiler after CUDA graphs crashes before CUDA 12.6.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    for _ in range(3):
        call(*sets[0])
    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for index in range(n_calls):
            call(*sets[index % len(sets)])
        synchronize()
    microseconds = sum(
        event.time_range.elapsed_us()
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    if microseconds == 0:
        raise RuntimeError("the profiler saw no kernel")
    return microseconds / 1e6 / n_calls


def host_time(call: Call, sets: Sets, n_calls: int = 50, at_most: float = 0.5) -> float:
    """Wall time of the Python call without waiting for the GPU; on the CPU, of all its work.

    Every few calls, outside the timing, the GPU's queue is emptied so that it never blocks.
    """
    seconds = []
    call(*sets[0])
    begin = time.perf_counter()
    for index in range(n_calls):
        if index % 4 == 0:
            synchronize()
        arguments = sets[index % len(sets)]
        start = time.perf_counter()
        call(*arguments)
        seconds.append(time.perf_counter() - start)
        if index >= 2 and time.perf_counter() - begin > at_most:
            break
    synchronize()
    return statistics.median(seconds)


class Stopwatch:
    """Times the parts of a step: by the clock on the CPU, by events on a GPU.

    Events are also recorded inside CUDA graphs, and again with each replay. Outside graphs, a
    part's time includes the time its kernels wait for their launches.

    Raises TypeError on a GPU if torch is too old for events in graphs.
    """

    def __init__(self, parts: Sequence[str], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: dict[str, tuple] = {}
        if self._on_gpu:
            self._marks = {part: (self._event(), self._event()) for part in parts}

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True, external=True)

    def timed(self, part: str, function: Call) -> Call:
        """Wrap ``function`` so that `read` returns the time of its latest call."""

        def on_gpu(*arguments: object, **options: object) -> object:
            begin, end = self._marks[part]
            begin.record()
            result = function(*arguments, **options)
            end.record()
            return result

        def on_cpu(*arguments: object, **options: object) -> object:
            begin = time.perf_counter()
            result = function(*arguments, **options)
            self._marks[part] = begin, time.perf_counter()
            return result

        return on_gpu if self._on_gpu else on_cpu

    def read(self) -> dict[str, float]:
        """Seconds of the latest call of each part; waits for the GPU."""
        synchronize()
        return {
            part: begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            for part, (begin, end) in self._marks.items()
        }


def peak_extra_bytes(call: Call, arguments: tuple) -> int:
    """Peak GPU memory of one call minus that before it, results included."""
    call(*arguments)
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*arguments)
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def attempted(
    not_here: str | None, deadline: float, measure: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """The numbers that ``measure`` returns, after their "status": "ok", or why there are none.

    It is not called if ``not_here`` gives a reason, or after the ``deadline`` (`time.monotonic`).
    """
    if not_here is None and time.monotonic() > deadline:
        not_here = "not run: out of time"
    if not_here is not None:
        return {"status": not_here}
    try:
        return {"status": "ok", **measure(*arguments)}
    except Exception as error:
        return {"status": "out of memory" if _out_of_memory(error) else f"failed: {error!r}"}
    finally:
        if GPU:
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException | None) -> bool:
    """Also if ending a broken capture raised another error."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def environment(*packages: str) -> dict[str, object]:
    """Device, date and versions, those of further ``packages`` too."""
    about: dict[str, object] = {
        "classroomkd": classroomkd.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
    }
    for package in ("triton", "liger-kernel", *packages):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = None
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        about["device"] = properties.name
        about["memory_gib"] = round(properties.total_memory / 2**30, 1)
        about["l2_mib"] = round(properties.L2_cache_size / 2**20, 1)
        about["multiprocessors"] = properties.multi_processor_count
    return about


def write_json(out: Path, name: str, record: dict[str, object]) -> None:
    """Write ``record`` to ``out/name.json``, creating the folder."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / f"{name}.json", as_json(record))


def as_json(record: Mapping[str, object]) -> str:
    """A record as JSON, with a line for each entry, or for each row of one."""
    entries = []
    for key, value in record.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list | tuple) and value:
            rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value)
            text = f"[\n{rows}\n]"
        entries.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


class KeptRows:
    """The rows of the record ``out/name.json``, which is written whenever a row is added.

    An interrupted benchmark resumes with the missing rows; ``keys`` are the columns that identify
    a row.
    """

    def __init__(self, out: Path, name: str, keys: Sequence[str]) -> None:
        self._out, self._name, self._keys = out, name, keys
        path = out / f"{name}.json"
        self.rows: list[dict[str, object]] = (
            json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        )

    def has(self, **values: object) -> bool:
        """Whether there is a row with these values of all keys."""
        return any(all(row[key] == values[key] for key in self._keys) for row in self.rows)

    def add(self, row: dict[str, object]) -> None:
        """Add a row and write the record."""
        self.rows.append(row)
        record = {"benchmark": self._name, "environment": environment(), "rows": self.rows}
        write_json(self._out, self._name, record)
