"""The loaders' base class: the order of the samples, shared by processes, and batches of it."""

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
    """How many cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def channel_statistics(
    image_set: ImageSet,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation (of the population) per RGB channel, of values scaled to 0..1.

    The sums are exact integers, so the result is the same on every machine. The deviation of a
    constant channel is given as 1 instead of 0, so that its values normalise to 0. Raises UserError
    if there are no images.
    """
    if not len(image_set):
        raise UserError("there are no images to take the mean and standard deviation of")
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
    """The three values, of red, green and blue, as a tuple."""
    red, green, blue = values
    return red, green, blue


class Loader(ABC):
    """Batches of a set of ``count`` images.

    Iterating gives ``(images, targets, indices)``: images [B, 3, H, W] of ``dtype``, normalised,
    channels-last in memory; targets and sample indices, int64 [B]; all on ``device``, and never
    written to again. Order and augmentation depend only on ``seed``, the epoch set with
    ``set_epoch`` (0 at first) and the sample's index: every loader gives the same bits, whatever
    its batch size, workers and rank, and gives them again when an epoch is iterated again. With
    ``mixing`` the targets are class probabilities, float32 [B, C], and images are mixed with others
    of their batch, so the bits then depend on batch size and rank too. An iteration is determined
    when it begins, with ``iter()``. One epoch is iterated at a time; use two loaders for two.

    The b-th batches of ``world_size`` processes together are the b-th batch of one process with
    batch size ``batch_size · world_size``. The last one, if it is not full, is divided as evenly as
    possible, and a process that would get none of it has one batch fewer. Where processes wait for
    each other at every batch (DistributedDataParallel), the others would then wait forever: set
    ``drop_last``.

    Args:
        count: how many images the set has.
        batch_size: images per batch; the last one is smaller unless ``drop_last``.
        mean: per RGB channel, of values scaled to 0..1.
        std: likewise; both as ``channel_statistics`` gives them.
        augmentation: random crop, flip and cutout, or None for the images as they are; for
            photographs, a crop to one size.
        mixing: MixUp or CutMix of the finished images, or None.
        shuffle: a new order each epoch instead of the set's own.
        drop_last: leave out the last batch if it is not full.
        seed: any integer, of which the lowest 64 bits are used.
        rank: which process this is, 0 ≤ rank < ``world_size``.
        world_size: how many processes share the set.
        device: of the batches; "cuda" is the GPU that is current when the loader is made.
        dtype: of the images, floating.

    Raises:
        UserError: the batch size or a standard deviation is not positive, ``drop_last`` would leave
            no batch at all, or the rank is not below the world size.
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
        self.mixing = mixing
        self.rank, self.world_size = rank, world_size
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.epoch = self.first_batch = 0
        self.closed = False
        self._table = torch.from_numpy(normalisation_table(mean, std)).to(dtype)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, which starts at the batch ``first_batch``.

        Raises UserError unless that is within 0..``len(self)``, the epoch's end.
        """
        if not 0 <= first_batch <= len(self):
            raise UserError(f"the first batch must be within 0..{len(self)}, got {first_batch}")
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch, in this process."""
        whole, rest = divmod(self.count, self.batch_size * self.world_size)
        return whole + (not self.drop_last and rest > self.rank)

    def __iter__(self) -> Iterator[Batch]:
        self._require_open()
        batches = self._batches()[self.first_batch :]
        made = self._iterate(batches, self.epoch)
        if self.mixing:
            made = self._mixed(made, batches, self.epoch, self.mixing)
        return self._while_open(made)

    def _mixed(
        self, made: Iterator[Batch], batches: list[np.ndarray], epoch: int, mixing: Mixing
    ) -> Iterator[Batch]:
        for batch, indices in zip(made, batches, strict=True):
            images, targets, samples = batch
            images, targets = mixing(images, targets, self.seed, epoch, indices)
            yield images, targets, samples
            del batch, images, targets, samples  # so that their memory may be used for the next

    def _while_open(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        self._require_open()
        for batch in batches:
            yield batch
            del batch  # so that its memory may be used for the next
            self._require_open()

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("the loader is closed")

    def _batches(self) -> list[np.ndarray]:
        """The sample indices, int64, of this process's batches in a whole epoch."""
        if self.shuffle:
            order = sample_order(self.seed, self.epoch, self.count)
        else:
            order = np.arange(self.count)
        together = self.batch_size * self.world_size
        batches = [order[start : start + together] for start in range(0, self.count, together)]
        return [np.array_split(batch, self.world_size)[self.rank] for batch in batches[: len(self)]]

    @abstractmethod
    def _iterate(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        """Give a batch of ``epoch`` for each array of sample indices."""

    def _to_device(self, images: Tensor, targets: Tensor, indices: Tensor) -> Batch:
        """A batch on its way to the device; the host waits for no GPU."""
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
