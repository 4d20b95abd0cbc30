"""Mentors whose logits are read from files, or written to files on first use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from classroomkd.training.graph import CapturedStep
from classroomkd.training.logits_files import KeptLogits, OwnLogits, Rows
from classroomkd.training.mentor_bank import MentorBank

_AHEAD = 4  # batches read ahead
_BEHIND = 64  # batches that may wait to be written

Source = KeptLogits | OwnLogits


class CachedMentors:
    """Returns the logits of every mentor for the batches of an epoch, one by one.

    A mentor runs only on batches for which its file lacks logits, and these are then stored. A
    thread reads and writes in the background, so that a step waits neither for files nor for a GPU.

    Args:
        names: the mentors, in the order of the logits.
        bank: the mentors that have a network; None if there are none.
        sources: the files by name; a mentor without a file runs on every batch.
        device: the device of the logits.
        dtype: of the logits.
        cuda_graph: whether to run the mentors as a CUDA graph on a GPU.
        notify: is called with a message if a file is damaged.

    """

    def __init__(
        self,
        names: Sequence[str],
        bank: MentorBank | None,
        sources: Mapping[str, Source],
        *,
        device: torch.device,
        dtype: torch.dtype,
        cuda_graph: bool = True,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.names = list(names)
        self._sources = [sources.get(name) for name in names]
        self._bank, self._device, self._dtype = bank, device, dtype
        self._captures = cuda_graph and device.type == "cuda"
        self._passes: dict[tuple[str, ...], Callable[[Tensor], list[Tensor]]] = {}
        self._notify = notify
        self._worker = ThreadPoolExecutor(1, "mentor-cache")
        self._batches: deque[np.ndarray] = deque()  # not yet being read
        self._reads: deque[tuple[np.ndarray, Future[list[Rows | None]]]] = deque()
        self._writes: deque[Future[None]] = deque()
        self._reported: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self.names)

    def begin(self, epoch: int, batches: Sequence[np.ndarray]) -> None:
        """Start with the remaining ``batches`` of sample indices of an epoch, counted from 1.

        ``epoch`` is that of the augmentation.
        """
        for _, read in self._reads:
            read.cancel()
        self._reads.clear()
        self._epoch, self._batches = epoch, deque(batches)
        for source in self._sources:
            if isinstance(source, KeptLogits):
                source.claim()
            if source is not None:
                source.read_ahead(epoch)
        for _ in range(_AHEAD):
            self._read_next()

    def next(self, images: Tensor) -> list[Tensor]:
        """The logits [B, C] of every mentor for the ``images`` of the next batch."""
        samples, read = self._reads.popleft()
        self._read_next()
        found = read.result()
        missing = [
            name
            for name, rows in zip(self.names, found, strict=True)
            if rows is None or not rows.known.all()
        ]
        computed = dict(zip(missing, self._compute(tuple(missing), images), strict=True))
        self._report_damage()
        return [
            self._joined(source, rows, computed.get(name), samples)
            for name, source, rows in zip(self.names, self._sources, found, strict=True)
        ]

    def close(self) -> None:
        """Write the remaining logits and release the files; a second call does nothing."""
        for _, read in self._reads:
            read.cancel()
        self._worker.shutdown()
        for write in self._writes:
            write.result()
        self._writes.clear()
        for source in self._sources:
            if isinstance(source, KeptLogits):
                source.close()

    def _read_next(self) -> None:
        if self._batches:
            samples = self._batches.popleft()
            self._reads.append((samples, self._worker.submit(self._read, self._epoch, samples)))

    def _read(self, epoch: int, samples: np.ndarray) -> list[Rows | None]:
        return [None if source is None else source.read(epoch, samples) for source in self._sources]

    def _compute(self, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
        """Run the mentors ``names``, as one separate graph if graphs are used."""
        if not names:
            return []
        assert self._bank is not None
        if names not in self._passes:
            run = partial(_logits, self._bank, names)
            self._passes[names] = CapturedStep(run) if self._captures else run
        return self._passes[names](images)

    def _joined(
        self, source: Source | None, rows: Rows | None, computed: Tensor | None, samples: np.ndarray
    ) -> Tensor:
        """The logits of a mentor: those in its file, and the ``computed`` ones that this lacks."""
        if rows is None:
            assert computed is not None
            return computed
        kept = None
        if rows.known.any():
            kept = self._to_device(rows.logits)
        if computed is None:
            assert kept is not None
            return kept.to(self._dtype)
        assert isinstance(source, KeptLogits)
        # Rounded to the file's dtype, so that computed and cached logits give the same run.
        computed = computed.to(torch.from_numpy(rows.logits[:0]).dtype)
        if kept is not None:  # known rows are kept: a row's bits may depend on its batch
            computed = torch.where(self._to_device(rows.known)[:, None], kept, computed)
        if source.writes:
            self._write(source, samples, computed)
        return computed.to(self._dtype)

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def _write(self, source: KeptLogits, samples: np.ndarray, logits: Tensor) -> None:
        """Queue a batch's logits to be written by the thread."""
        copied = None
        if self._device.type == "cuda":
            host = torch.empty(logits.shape, dtype=logits.dtype, device="cpu", pin_memory=True)
            host.copy_(logits, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            logits = host

        def write(epoch: int = self._epoch) -> None:
            if copied is not None:
                copied.synchronize()
            source.write(epoch, samples, logits.numpy())

        self._writes.append(self._worker.submit(write))
        while self._writes and (self._writes[0].done() or len(self._writes) > _BEHIND * len(self)):
            self._writes.popleft().result()

    def _report_damage(self) -> None:
        for number, source in enumerate(self._sources):
            for epoch in list(source.damaged) if isinstance(source, KeptLogits) else ():
                if (number, epoch) not in self._reported:
                    self._reported.add((number, epoch))
                    assert isinstance(source, KeptLogits)
                    self._notify(
                        f"{source.folder} is damaged in epoch {epoch}: mentor "
                        f"{self.names[number]} runs again on the damaged images"
                    )


def _logits(bank: MentorBank, names: Sequence[str], images: Tensor) -> list[Tensor]:
    return [outputs.logits for outputs in bank(images, names)]
