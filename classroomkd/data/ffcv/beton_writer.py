"""FFCV's dataset writer, run in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from classroomkd.data.ffcv.bindings import import_ffcv

import_ffcv()  # before anything is imported from it

from ffcv.memory_allocator import MemoryAllocator  # noqa: E402
from ffcv.writer import DatasetWriter  # noqa: E402


class InProcessWriter(DatasetWriter):
    """Calls FFCV's worker in this process instead of starting worker processes.

    In a worker process, an exception leaves the parent waiting forever, and several workers fill
    the file in a random order. ``advance`` is called with the number of samples written since the
    last call.
    """

    metadata_sm: Any

    def __init__(
        self, path: str, fields: dict[str, Any], page_size: int, advance: Callable[[int], None]
    ) -> None:
        super().__init__(path, fields, page_size=page_size, num_workers=1)
        self._advance = advance

    def prepare(self) -> None:
        super().prepare()
        # The sample table needs no shared memory here, which is scarce in containers.
        shared, size = self.metadata_sm, self.num_samples * self.metadata_type.itemsize
        shared.close()
        shared.unlink()
        self.metadata_sm = SimpleNamespace(buf=bytearray(size))

    def _write_common(
        self, num_samples: int, queue_content: Iterable, work_fn: Callable, extra_worker_args: tuple
    ) -> None:
        self.num_samples = num_samples
        self.prepare()
        work: SimpleQueue[Any] = SimpleQueue()
        allocations: SimpleQueue[Any] = SimpleQueue()
        for chunk in queue_content:
            work.put(chunk)
        work.put(None)  # the end
        work_fn(
            work,
            self.metadata_sm,
            self.metadata_type,
            self.fields,
            _Allocator(self.fname, self.data_region_start, self.page_size),
            _Counter(self._advance),
            allocations,
            *extra_worker_args,
        )
        self.finalize(allocations.get())


class _Allocator(MemoryAllocator):
    """Writes pages as FFCV does, with two changes.

    The file is buffered, because an unbuffered write can be short when the disk fills up. After an
    exception nothing more is written, because it could wait forever for a page already written.
    """

    def __enter__(self) -> None:
        self.fp = open(self.fname, "ab")

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:
            self.flush_page()
        self.fp.close()


class _Counter:
    """Replaces the shared counter of finished samples."""

    get_lock = staticmethod(nullcontext)

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._value = advance, 0

    @property
    def value(self) -> int:
        return self._value

    @value.setter
    def value(self, value: int) -> None:
        self._advance(value - self._value)
        self._value = value
