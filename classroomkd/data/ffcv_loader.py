"""The loader on FFCV: batches made from a mapped ``.beton`` file while the device works.

FFCV reads the file, plans the memory and runs the pipeline in a thread of its own, batches ahead.
The pipeline is one operation, ours: it goes from the file's bytes to finished images in one pass
and, for a GPU, on to the device from pinned memory in a stream of its own.

What FFCV 1.0 leaves to its users is dealt with here: an error in the pipeline reaches the caller
instead of leaving it waiting; an epoch that is broken off, or closed, or alive when the process
ends, has its thread ended and joined; batches are the caller's to keep; thread counts of torch and
numba stay what they were; nothing is compiled anew in each process.
"""

from __future__ import annotations

import atexit
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from queue import Empty, Full
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classroomkd.data._ffcv import import_ffcv, kept_threads
from classroomkd.data.beton_file import RAW, Beton, open_beton
from classroomkd.data.loader import Batch, Loader, available_cores
from classroomkd.data.pixels import augment_batch
from classroomkd.errors import UserError

ffcv = import_ffcv()

from ffcv import libffcv  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.pipeline_spec import PipelineSpec  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

_AHEAD = 3  # finished batches that wait for the caller


class FFCVLoader(Loader):
    """Reads the ``.beton`` file ``path``; all else as for `Loader`.

    Photographs, of any size and also as JPEG, need a `RandomResizedCrop` or a `CentreCrop` as
    ``augmentation``. Batches are made one after another in a thread of their own; ``workers``
    threads share each batch, by default one, and for photographs one a core. The caller's thread
    never waits for a GPU.

    Raises UserError if FFCV is not installed, or the file is not one that can be used.
    """

    def __init__(
        self, path: Path | str, batch_size: int, *, workers: int | None = None, **options
    ) -> None:
        beton = open_beton(path)
        super().__init__(len(beton), batch_size, **options)
        if workers is None:
            workers = available_cores() if self.crop else 1
        if workers < 1:
            raise UserError(f"the number of workers must be at least 1, got {workers}")
        if not self.crop:
            _require_uniform(beton)
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None
        self._make = _MakeBatch(self, beton, workers)
        image = PipelineSpec("image", decoder=self._make)
        pipelines = {"image": image, "label": None}  # the targets are in memory already
        with kept_threads():
            Compiler.set_enabled(False)  # the operation brings compiled code of its own
            try:
                self._reader = ffcv.Loader(
                    str(path),
                    batch_size,
                    num_workers=1,
                    os_cache=True,
                    pipelines=pipelines,
                    batches_ahead=_AHEAD,
                )
            finally:
                Compiler.set_enabled(True)

    def _iterate(self, batches: list[np.ndarray]) -> Iterator[Batch]:
        if not batches:
            return
        self._make.epoch = self.epoch
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            epoch = _Epoch(self._reader, np.concatenate(batches), self.device)
        try:
            yield from epoch
        finally:
            epoch.close()

    def close(self) -> None:
        super().close()
        for epoch in list(_alive):
            if epoch.loader is self._reader:
                epoch.close()
        if self._pool:
            self._pool.shutdown()
        self._reader = self._make = None


def _require_uniform(beton: Beton) -> None:
    """Raise UserError unless all images are stored as pixels and have one size."""
    sizes = set(zip(beton.heights.tolist(), beton.widths.tolist(), strict=True))
    if len(sizes) > 1 or (beton.modes != RAW).any():
        raise UserError(
            f"{beton.path} holds photographs of {len(sizes)} sizes, or JPEGs, which need a crop to "
            "one size"
        )


class _MakeBatch(Operation):
    """The whole pipeline: sample indices in, ``(images, targets, indices)`` on the device out."""

    def __init__(self, loader: FFCVLoader, beton: Beton, workers: int) -> None:
        super().__init__()
        self.loader, self.beton, self.workers = loader, beton, workers
        height, width = int(beton.heights[0]), int(beton.widths[0])
        self.shape = (loader.crop.size,) * 2 + (3,) if loader.crop else (height, width, 3)
        self.epoch = 0
        self.copied: dict[int, torch.cuda.Event] = {}  # by the address of the pinned buffer

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        dtype, on_gpu = self.loader.dtype, self.loader.device.type == "cuda"
        state = replace(previous_state, jit_mode=False, shape=self.shape, dtype=dtype)
        pinned = AllocationQuery(self.shape, dtype) if on_gpu else None
        return state, pinned

    def generate_code(self) -> Callable[..., Batch]:
        def make(
            indices: np.ndarray, buffer: Tensor | None, metadata: np.ndarray, storage: tuple
        ) -> Batch:
            loader, beton = self.loader, self.beton
            if buffer is None:
                buffer = torch.empty((len(indices), *self.shape), dtype=loader.dtype)
            elif buffer.data_ptr() in self.copied:  # its last copy may still be under way
                self.copied[buffer.data_ptr()].synchronize()
            augmentation, pixels, starts = loader.augmentation, beton.data, beton.starts[indices]
            if loader.crop:
                augmentation, pixels = loader.crop.after, self._crops(indices)
                starts = np.arange(len(indices)) * math.prod(self.shape)
            augment_batch(
                pixels,
                starts,
                indices,
                augmentation,
                loader.seed,
                self.epoch,
                loader._table,
                buffer,
                loader._pool,
                self.workers,
            )
            images = buffer.permute(0, 3, 1, 2)
            parts = torch.from_numpy(beton.targets[indices]), torch.from_numpy(indices)
            if loader.device.type == "cpu":
                return images, *parts
            images = images.to(loader.device, non_blocking=True)
            self.copied[buffer.data_ptr()] = torch.cuda.current_stream().record_event()
            parts = (part.pin_memory().to(loader.device, non_blocking=True) for part in parts)
            return images, *parts

        return make

    def _crops(self, indices: np.ndarray) -> np.ndarray:
        """The photographs' crops, decoded and resized by FFCV's library, uint8 [bytes]."""
        loader, beton = self.loader, self.beton
        sizes = beton.heights[indices], beton.widths[indices]
        boxes = loader.crop.boxes(loader.seed, self.epoch, indices, *sizes)
        crops = np.empty((len(indices), *self.shape), np.uint8)

        def fill(index: int, box: np.ndarray, crop: np.ndarray) -> None:
            height, width = int(beton.heights[index]), int(beton.widths[index])
            stored = beton.stored(index)
            if beton.modes[index] == RAW:
                image = stored.reshape(height, width, 3)
            else:
                image = np.empty((height, width, 3), np.uint8)
                if libffcv.imdecode(stored, image, height, width, height, width):
                    raise UserError(f"{beton.path}: image {index} cannot be decoded: pack it again")
            row, column, rows, columns = box.tolist()
            libffcv.resize_crop(image, row, row + rows, column, column + columns, crop)

        run = loader._pool.map if loader._pool else map
        for _ in run(fill, indices.tolist(), boxes, crops):
            pass
        return crops.reshape(-1)


class _Epoch(EpochIterator):
    """FFCV's epoch, with an end to its thread and a way out for its errors."""

    def __init__(self, reader: Any, order: np.ndarray, device: torch.device) -> None:
        self.device = device
        self.ended = False
        super().__init__(reader, order)  # this starts the thread
        _alive.add(self)

    def run(self) -> None:
        slots = self.loader.batches_ahead + 2
        device = self.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                for number, indices in enumerate(self.iter_ixes):
                    slot = number % slots
                    (batch,) = self.run_pipeline(number, indices, slot, None)
                    if not self._hand_over((slot, batch)):
                        return
            self._hand_over(None)
        except BaseException as error:
            self._hand_over(error)

    def _hand_over(self, item: Any) -> bool:
        """Queue ``item`` for the caller; False if nobody wants it any more."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def __next__(self) -> Batch:
        item = None if self.ended else self.output_queue.get()
        if not isinstance(item, tuple):
            self.close()
            raise StopIteration if item is None else item
        slot, batch = item
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self.cuda_streams[slot])
            for part in batch:
                part.record_stream(stream)
        return batch

    def close(self) -> None:
        """End the thread and wait for it."""
        self.ended = True
        self.terminate_event.set()
        while self.is_alive() and threading.current_thread() is not self:
            try:
                self.output_queue.get_nowait()
            except Empty:
                self.join(0.01)
        super().close()
        self.closed = True


_alive: weakref.WeakSet[_Epoch] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that still runs while the interpreter is taken down would abort the process."""
    for epoch in list(_alive):
        epoch.close()
