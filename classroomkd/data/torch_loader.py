"""The loader based on PyTorch's DataLoader, for any map-style data set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classroomkd.data.crops import CentreCrop, RandomResizedCrop
from classroomkd.data.image_sets import ImageSet, as_sample
from classroomkd.data.loader import Batch, Loader, available_cores
from classroomkd.errors import UserError


class TorchLoader(Loader):
    """Reads an ``ImageSet``, or any map-style data set, in ``workers`` processes.

    A map-style set has a length and returns ``(image, target)`` by index: a PIL image or a uint8
    array [H, W, 3], and an integer. Images of varying size need a `RandomResizedCrop` or a
    `CentreCrop` as ``augmentation``. Each worker (by default one per core; 0 uses this process)
    makes whole batches. Otherwise as `Loader`.

    A new iteration ends the previous one, whose next step raises RuntimeError. On a GPU, PyTorch
    pins the batches in a separate thread, so capturing a CUDA graph meanwhile needs
    ``capture_error_mode="thread_local"``.
    """

    def __init__(
        self, data: ImageSet | Any, batch_size: int, *, workers: int | None = None, **options
    ) -> None:
        super().__init__(len(data), batch_size, **options)
        if workers is None:
            workers = available_cores()
        if workers < 0:
            raise UserError(f"the number of workers must be at least 0, got {workers}")
        import classroomkd.data.pixels  # noqa: F401  (otherwise each worker imports it)

        self._keys: list[tuple[int, np.ndarray]] = []
        self._loader: DataLoader | None = DataLoader(
            _Batches(data, self),
            batch_size=None,
            sampler=self._keys,
            num_workers=workers,
            generator=torch.Generator(),  # otherwise each epoch draws from the global one
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )
        # Workers end when nothing refers to the source, so iterations must not.
        self._running: list | None = None
        self._source: Iterator | None = None

    def _iterate(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        self._keys[:] = keys = [(epoch, indices) for indices in batches]
        assert self._loader is not None  # __iter__ requires an open loader
        self._running, self._source = keys, iter(self._loader)
        for _ in keys:
            if self._running is not keys:
                raise RuntimeError("the loader started another epoch: iterate one at a time")
            batch = next(self._source)
            if isinstance(batch, UserError):
                raise batch
            images, targets, indices = self._to_device(*batch)
            yield images.permute(0, 3, 1, 2), targets, indices

    def close(self) -> None:
        super().close()
        self._loader = self._source = None


class _Batches(Dataset):
    """A data set of whole batches: its key is (epoch, sample indices)."""

    def __init__(self, data: Any, loader: TorchLoader) -> None:
        if isinstance(data, ImageSet):
            data = replace(data, images=np.ascontiguousarray(data.images))
        self.data, self.seed, self.table = data, loader.seed, loader._table
        self.augmentation, self.crop = loader.augmentation, loader.crop

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor, Tensor] | UserError:
        try:
            return self._make(*key)
        except UserError as error:  # if raised in a worker, it would become a traceback
            return error

    def _make(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        from classroomkd.data.pixels import augment_batch

        if isinstance(self.data, ImageSet) and not self.crop:
            images, targets, rows = self.data.images, self.data.targets[indices], indices
        else:
            images, targets = self._collect(epoch, indices)
            rows = np.arange(len(indices))
        shape = images.shape[1:]
        out = torch.empty((len(indices), *shape), dtype=self.table.dtype, device="cpu")
        pixels, starts = images.reshape(-1), rows * math.prod(shape)
        options = self.augmentation, self.seed, epoch, self.table, out
        augment_batch(pixels, starts, indices, *options)
        return out, torch.from_numpy(targets), torch.from_numpy(indices)

    def _collect(self, epoch: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images: list[np.ndarray] = []
        targets = np.empty(len(indices), np.int64)
        for i, index in enumerate(indices.tolist()):
            sample = self.data[index]
            try:
                image, targets[i] = as_sample(sample)
            except (TypeError, ValueError) as error:
                message = f"sample {index} of the data set cannot be used: {error}"
                raise UserError(message) from error
            if self.crop:
                image = self._resized(image, self.crop, epoch, index)
            if images and image.shape != images[0].shape:
                raise UserError(
                    f"sample {index} of the data set is {list(image.shape)}, another one "
                    f"{list(images[0].shape)}: resize them to one size first"
                )
            images.append(image)
        return np.stack(images), targets

    def _resized(
        self, image: np.ndarray, crop: RandomResizedCrop | CentreCrop, epoch: int, index: int
    ) -> np.ndarray:
        from PIL import Image

        place = (np.array([n]) for n in (index, *image.shape[:2]))
        ((row, column, height, width),) = crop.boxes(self.seed, epoch, *place)
        part = Image.fromarray(np.ascontiguousarray(image)).crop(
            (column, row, column + width, row + height)
        )
        return np.asarray(part.resize((crop.size, crop.size), Image.Resampling.BILINEAR))
