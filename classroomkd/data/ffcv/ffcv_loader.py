"""The loader based on FFCV: makes batches from a mapped ``.beton`` file in a background thread.

FFCV reads the file, plans the memory and generates the pipeline's code. Each epoch has a thread
that runs this code a few batches ahead of the caller. The pipeline is a single custom operation: it
makes finished images from the file's bytes in one pass and, for a GPU, copies them to the device
from pinned memory, in one stream for all batches.

This module also fixes shortcomings of FFCV 1.0. Errors in the pipeline reach the caller instead of
leaving it waiting. The thread of an abandoned or closed epoch is joined, also at exit. Batches are
not overwritten. The thread counts of torch and numba are kept. Nothing is recompiled per process.
An epoch allocates no device memory or streams of its own, and a CPU loader does not touch CUDA.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classroomkd.data.crops import CentreCrop, RandomResizedCrop
from classroomkd.data.ffcv.beton_file import RAW, Beton, open_beton
from classroomkd.data.ffcv.bindings import import_ffcv, kept_threads
from classroomkd.data.loader import Batch, Loader, available_cores
from classroomkd.data.pixels import augment_batch
from classroomkd.errors import UserError

ffcv = import_ffcv()

from ffcv import libffcv  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.pipeline_spec import PipelineSpec  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

_AHEAD = 3  # finished batches waiting for the caller
_SLOTS = _AHEAD + 2  # plus one being made and one being copied


class FFCVLoader(Loader):
    """Reads the ``.beton`` file ``path``; otherwise as `Loader`.

    Photographs, of varying size or stored as JPEG, need a `RandomResizedCrop` or a `CentreCrop` as
    ``augmentation``. A thread makes the batches one after another; ``workers`` threads share each
    batch, by default one, and for photographs one per core. The caller never waits for a GPU.

    The background thread pins memory and records events. Capturing a CUDA graph meanwhile needs
    ``capture_error_mode="thread_local"``: by default PyTorch forbids both to all threads, which
    breaks the capture or the epoch.

    Raises UserError if FFCV is not installed or the file cannot be used.
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
        self._workers, self._process = workers, os.getpid()
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._memory: list[dict] = []  # of finished epochs, for reuse
        pipelines = {"image": PipelineSpec("image", decoder=_MakeBatch(self, beton))}
        with kept_threads():
            Compiler.set_enabled(False)  # the operation is compiled already
            try:
                self._reader = ffcv.Loader(
                    str(beton.path),
                    batch_size,
                    num_workers=1,
                    os_cache=True,
                    pipelines=pipelines | {"label": None},  # the targets are in memory already
                    batches_ahead=_AHEAD,
                )
            finally:
                Compiler.set_enabled(True)
        self._reader.memory_manager.context.mmap = beton.data  # the file whose tables were checked

    def _iterate(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        if self._pool and self._process != os.getpid():  # a fork does not copy the threads
            self._process, self._pool = os.getpid(), ThreadPoolExecutor(self._workers)
        running = _Epoch(self, batches, epoch)
        try:
            for _ in batches:
                yield running.take()
        finally:
            running.close()

    def close(self) -> None:
        super().close()
        for epoch in list(_alive):
            if epoch.loader is self:
                epoch.close()
        if self._pool:
            self._pool.shutdown()
        self._reader, self._memory = None, []


def _require_uniform(beton: Beton) -> None:
    """Raise UserError unless all images are stored as pixels and have one size."""
    sizes = set(zip(beton.heights.tolist(), beton.widths.tolist(), strict=True))
    if len(sizes) > 1 or (beton.modes != RAW).any():
        raise UserError(
            f"{beton.path} holds photographs of {len(sizes)} sizes, or JPEGs: they need a crop to "
            "one size"
        )


class _MakeBatch(Operation):
    """The whole pipeline, from (epoch, sample indices) to a batch and its event.

    The batch, ``(images, targets, indices)``, is on the device when the event has completed. On the
    CPU the event is None.
    """

    def __init__(self, loader: FFCVLoader, beton: Beton) -> None:
        super().__init__()
        self.loader, self.beton = loader, beton
        height, width = int(beton.heights[0]), int(beton.widths[0])
        self.shape = (loader.crop.size,) * 2 + (3,) if loader.crop else (height, width, 3)
        self.copied: dict[int, torch.cuda.Event] = {}  # by the address of the pinned buffer

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        dtype, on_gpu = self.loader.dtype, self.loader.device.type == "cuda"
        state = replace(previous_state, jit_mode=False, shape=self.shape, dtype=dtype)
        pinned = AllocationQuery(self.shape, dtype, torch.device("cpu")) if on_gpu else None
        return state, pinned

    def generate_code(self) -> Callable[..., tuple[Batch, torch.cuda.Event | None]]:
        def make(
            key: tuple[int, np.ndarray], buffer: Tensor | None, metadata: np.ndarray, storage: tuple
        ) -> tuple[Batch, torch.cuda.Event | None]:
            (epoch, indices), loader, beton = key, self.loader, self.beton
            if buffer is None:
                shape = len(indices), *self.shape
                buffer = torch.empty(shape, dtype=loader.dtype, device="cpu")
            elif buffer.data_ptr() in self.copied:  # its last copy may be unfinished
                self.copied[buffer.data_ptr()].synchronize()
            pixels, starts = storage[0], beton.starts[indices]
            if loader.crop:
                pixels = self._crops(loader.crop, epoch, indices)
                starts = np.arange(len(indices)) * math.prod(self.shape)
            options = loader.augmentation, loader.seed, epoch, loader._table, buffer
            augment_batch(pixels, starts, indices, *options, loader._pool, loader._workers)
            images = buffer.permute(0, 3, 1, 2)
            targets, samples = torch.from_numpy(beton.targets[indices]), torch.from_numpy(indices)
            if loader.device.type == "cpu":
                return (images, targets, samples), None
            batch = loader._to_device(images, targets.pin_memory(), samples.pin_memory())
            event = torch.cuda.Event(blocking=True)  # waiting does not use the CPU
            event.record()
            self.copied[buffer.data_ptr()] = event
            return batch, event

        return make

    def _crops(
        self, crop: RandomResizedCrop | CentreCrop, epoch: int, indices: np.ndarray
    ) -> np.ndarray:
        """The photographs' crops, decoded and resized by FFCV's library, uint8 [bytes]."""
        loader, beton = self.loader, self.beton
        sizes = beton.heights[indices], beton.widths[indices]
        boxes = crop.boxes(loader.seed, epoch, indices, *sizes)
        crops = np.empty((len(indices), *self.shape), np.uint8)

        def fill(index: int, box: np.ndarray, crop: np.ndarray) -> None:
            height, width = int(beton.heights[index]), int(beton.widths[index])
            stored = beton.stored(index)
            if beton.modes[index] == RAW:
                image = stored.reshape(height, width, 3)
            else:
                beton.check_jpeg(index)  # a smaller JPEG would leave part of the image unwritten
                image = np.empty((height, width, 3), np.uint8)
                if libffcv.imdecode(stored, image, height, width, height, width):
                    raise UserError(f"{beton.path}: image {index} cannot be read: pack it again")
            row, column, rows, columns = box.tolist()
            libffcv.resize_crop(image, row, row + rows, column, column + columns, crop)

        run = loader._pool.map if loader._pool else map
        for _ in run(fill, indices.tolist(), boxes, crops):
            pass
        return crops.reshape(-1)


class _Epoch(threading.Thread):
    """Makes an epoch's batches ahead of the caller, until the last one or ``close``."""

    def __init__(self, loader: FFCVLoader, batches: list[np.ndarray], epoch: int) -> None:
        super().__init__(daemon=True)
        self.loader, self.batches, self.epoch = loader, batches, epoch
        self._ready: deque = deque()
        self._change = threading.Condition()
        self._ended = False
        _alive.add(self)
        self.start()

    def run(self) -> None:
        stream, reader = self.loader._stream, self.loader._reader
        spare = self.loader._memory
        try:
            with (
                torch.cuda.stream(stream) if stream else nullcontext(),
                reader.memory_manager.schedule_epoch(self.batches) as storage,
            ):
                try:
                    memory = spare.pop()
                except IndexError:
                    memory = reader.graph.allocate_memory(reader.batch_size, _SLOTS)
                for number, indices in enumerate(self.batches):
                    storage.start_batch(number)
                    if not self._hand_over(self._make(indices, number % _SLOTS, memory, storage)):
                        break
                spare.append(memory)
        except BaseException as error:
            self._hand_over(error)

    def _make(self, indices: np.ndarray, slot: int, memory: dict, storage: Any) -> tuple:
        """Run the code that FFCV generated from the pipeline, as its own iterator does."""
        reader = self.loader._reader
        arguments = {
            "batch_indices": (self.epoch, indices),
            "metadata": reader.reader.metadata,
            "storage_state": storage.state,
        }
        for kind, name in (("operation", "memory"), ("shared", "shared_memory")):
            for node, slots in memory[kind].items():
                arguments[f"{name}_{node}"] = slots and slots[slot][: len(indices)]
        stages, (last,) = reader.code
        for code, nodes in stages:
            names = [f"result_{node}" for node in nodes]
            arguments |= zip(names, code(**arguments), strict=True)
        return arguments[f"result_{last}"]

    def _hand_over(self, item: Any) -> bool:
        """Queue ``item`` for the caller; False if the epoch is closed."""
        with self._change:
            self._change.wait_for(lambda: self._ended or len(self._ready) < _AHEAD)
            self._ready.append(item)
            self._change.notify_all()
        return not self._ended

    def take(self) -> Batch:
        """The next batch; raises the error of making it, or RuntimeError after ``close``."""
        with self._change:
            self._change.wait_for(lambda: self._ended or self._ready)
            if self._ended:
                raise RuntimeError("the loader is closed")
            item = self._ready.popleft()
            self._change.notify_all()
        if isinstance(item, BaseException):
            raise item
        batch, event = item
        if event:
            stream = torch.cuda.current_stream(self.loader.device)
            stream.wait_event(event)
            for part in batch:
                part.record_stream(stream)
        return batch

    def close(self) -> None:
        """End the thread and wait for it."""
        self._ended = True
        # In a forked process the thread is not alive, and the lock may be held forever.
        if self.is_alive() and threading.current_thread() is not self:
            with self._change:
                self._change.notify_all()
            self.join()
        self._ready.clear()


_alive: weakref.WeakSet[_Epoch] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End all threads, because one that runs while the interpreter exits aborts the process."""
    for epoch in list(_alive):
        epoch.close()
