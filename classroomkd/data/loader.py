"""The base class of the loaders: the order of the samples, divided into batches and processes."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from classroomkd.data.augmentation import Augmentation, normalisation_table, sample_order
from classroomkd.data.crops import CentreCrop, RandomResizedCrop
from classroomkd.data.image_sets import ImageSet
from classroomkd.data.mixing import Mixing
from classroomkd.errors import UserError

Batch = tuple[Tensor, Tensor, Tensor]


def available_cores() -> int:
    """The number of cores available to this process."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def channel_statistics(
    image_set: ImageSet,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation (of the population) per RGB channel, of values scaled to 0..1.

    The sums are exact integers, so the result is the same on every machine. A constant channel has
    deviation 1 instead of 0, so that its values normalise to 0. Raises UserError if there are no
    images.
    """
    if not len(image_set):
        raise UserError("there are no images to compute the mean and standard deviation of")
    means, stds = [], []
    for channel in range(3):
        values = torch.from_numpy(image_set.images[..., channel].ravel())
        counts = torch.bincount(values, minlength=256).tolist()
        n, total = sum(counts), sum(v * count for v, count in enumerate(counts))
        squares = sum(v * v * count for v, count in enumerate(counts))
        means.append(total / (255 * n))
        stds.append(math.sqrt(n * squares - total * total) / (255 * n) or 1.0)
    return per_channel(means), per_channel(stds)


def per_channel(values: Sequence[float]) -> tuple[float, float, float]:
    """The values of red, green and blue as a tuple."""
    red, green, blue = values
    return red, green, blue


class Loader(ABC):
    """Batches of a set of ``count`` images.

    Iterating yields ``(images, targets, indices)``: images [B, 3, H, W] of ``dtype``, normalised,
    channels-last in memory; targets and sample indices, int64 [B]; all on ``device``. The loader
    does not write to them again. Order and augmentation depend only on ``seed``, the epoch set with
    ``set_epoch`` (initially 0) and the sample's index, not on the kind of loader, batch size,
    workers or rank. With ``mixing`` the targets are class probabilities, float32 [B, C], and images
    are mixed with others of their batch, so the bits also depend on batch size and rank. ``iter()``
    fixes the epoch of an iteration. Iterate one epoch at a time per loader.

    The b-th batches of ``world_size`` processes together are the b-th batch of one process with
    batch size ``batch_size · world_size``. An incomplete last batch is divided as evenly as
    possible, and a process without images in it has one batch fewer. If processes synchronise at
    every batch (DistributedDataParallel), set ``drop_last``, or the others wait forever.

    Args:
        count: number of images in the set.
        batch_size: images per batch; the last one is smaller unless ``drop_last``.
        mean: per RGB channel, of values scaled to 0..1.
        std: standard deviation per RGB channel, as from ``channel_statistics``.
        augmentation: random crop, flip and cutout, or None; for photographs, a crop to one size.
        mixing: MixUp or CutMix of the finished images, or None.
        repeat: the number of epochs, from 1, after which the augmentation of each sample repeats,
            in a new order; None never.
        shuffle: use a new order in each epoch instead of the set's own.
        drop_last: drop the last batch if it is incomplete.
        seed: any integer; the lowest 64 bits are used.
        rank: index of this process, 0 ≤ rank < ``world_size``.
        world_size: number of processes that share the set.
        device: of the batches; "cuda" is the current GPU when the loader is made.
        dtype: floating dtype of the images.

    Raises:
        UserError: the batch size or a standard deviation is not positive, ``drop_last`` leaves no
            batch, or the rank is not below the world size.
    """

    seekable = True
    """Whether an iteration may start within an epoch."""
    one_shape = True
    """Whether the batches that a training gets of it have one shape."""

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | RandomResizedCrop | CentreCrop | None,
        shuffle: bool,
        drop_last: bool,
        mixing: Mixing | None = None,
        repeat: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise UserError(f"the rank must be within 0..{world_size - 1}, got {rank}")
        if drop_last and batch_size * world_size > count:
            processes = f" in each of {world_size} processes" if world_size > 1 else ""
            raise UserError(
                f"the batch size {batch_size}{processes} is larger than the set of {count} images: "
                "make it smaller"
            )
        self.count, self.batch_size, self.drop_last = count, batch_size, drop_last
        self.crop: RandomResizedCrop | CentreCrop | None = None
        if isinstance(augmentation, RandomResizedCrop | CentreCrop):
            self.crop, augmentation = augmentation, augmentation.after
        self.augmentation = augmentation
        self.shuffle, self.seed = shuffle, seed
        self.mixing, self.repeat = mixing, repeat
        self.rank, self.world_size = rank, world_size
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.epoch = self.first_batch = 0
        self.closed = False
        self._table = torch.from_numpy(normalisation_table(mean, std)).to(dtype)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch of the next iteration and the batch at which it starts.

        Raises UserError unless ``first_batch`` is within 0..``len(self)``.
        """
        if not 0 <= first_batch <= len(self):
            raise UserError(f"the first batch must be within 0..{len(self)}, got {first_batch}")
        self.epoch, self.first_batch = epoch, first_batch

    @property
    def augmentation_epoch(self) -> int:
        """The epoch that the augmentation of the next iteration is drawn for."""
        return self.epoch if self.repeat is None else (self.epoch - 1) % self.repeat + 1

    def upcoming(self) -> list[np.ndarray]:
        """The sample indices, int64, of the batches of the next iteration, in this process."""
        return self._batches()[self.first_batch :]

    def __len__(self) -> int:
        """Batches in a whole epoch, in this process."""
        whole, rest = divmod(self.count, self.batch_size * self.world_size)
        return whole + (not self.drop_last and rest > self.rank)

    def __iter__(self) -> Iterator[Batch]:
        self._require_open()
        batches, epoch = self.upcoming(), self.augmentation_epoch
        made = self._iterate(batches, epoch)
        if self.mixing:
            made = self._mixed(made, batches, epoch, self.mixing)
        return self._while_open(made)

    def _mixed(
        self, made: Iterator[Batch], batches: list[np.ndarray], epoch: int, mixing: Mixing
    ) -> Iterator[Batch]:
        for batch, indices in zip(made, batches, strict=True):
            images, targets, samples = batch
            images, targets = mixing(images, targets, self.seed, epoch, indices)
            yield images, targets, samples
            del batch, images, targets, samples  # frees their memory for the next

    def _while_open(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        self._require_open()
        for batch in batches:
            yield batch
            del batch  # frees its memory for the next
            self._require_open()

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("the loader is closed")

    def _batches(self) -> list[np.ndarray]:
        """The sample indices, int64, of all batches of this process in an epoch."""
        if self.shuffle:
            order = sample_order(self.seed, self.epoch, self.count)
        else:
            order = np.arange(self.count)
        together = self.batch_size * self.world_size
        batches = [order[start : start + together] for start in range(0, self.count, together)]
        return [np.array_split(batch, self.world_size)[self.rank] for batch in batches[: len(self)]]

    @abstractmethod
    def _iterate(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        """Yield a batch of ``epoch`` for each array of sample indices."""

    def _to_device(self, images: Tensor, targets: Tensor, indices: Tensor) -> Batch:
        """Copy a batch to the device without waiting for it."""
        return (
            images.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
            indices.to(self.device, non_blocking=True),
        )

    def close(self) -> None:
        """Release memory, threads and processes; a second call does nothing.

        Iterating then raises RuntimeError, as does the next step of an unfinished iteration.
        """
        self.closed = True

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()
