"""The resident loader: the whole set as uint8 in memory, each batch gathered from it at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from classroomkd.data.augment import Augmentation, normalisation_table, sample_order
from classroomkd.data.sources import ImageSet
from classroomkd.errors import UserError


def channel_statistics(
    image_set: ImageSet,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation (of the population) per RGB channel, of values scaled to 0..1.

    The sums are exact integers, so the result is the same on every machine. A channel of one value
    throughout has no deviation to divide by: its 0 is given as 1, so that it normalises to 0.
    """
    means, stds = [], []
    for channel in range(3):
        values = torch.from_numpy(image_set.images[..., channel].ravel())
        counts = torch.bincount(values, minlength=256).tolist()
        n, total = sum(counts), sum(v * count for v, count in enumerate(counts))
        squares = sum(v * v * count for v, count in enumerate(counts))
        means.append(total / (255 * n))
        stds.append(math.sqrt(n * squares - total * total) / (255 * n) or 1.0)
    return tuple(means), tuple(stds)


class ResidentLoader:
    """Batches of an image set that is held whole, as uint8, on ``device``.

    Iterating gives ``(images, targets, indices)``: images [B, 3, H, W] of ``dtype``, normalised,
    channels-last in memory; targets and sample indices, int64 [B]; all on ``device``. Order and
    augmentation depend only on ``seed``, the epoch set with ``set_epoch`` (0 at first) and the
    sample's index, so an epoch iterated again gives the same bits.

    Args:
        image_set: the images, targets and classes.
        batch_size: images a batch; the last one is smaller unless ``drop_last``.
        mean: per RGB channel, of values scaled to 0..1.
        std: likewise; both as ``channel_statistics`` gives them.
        augmentation: random crop and flip, or None for the images as they are.
        shuffle: a new order each epoch instead of the set's own.
        drop_last: leave out the last batch where it is not full.
        seed: any integer; its lowest 64 bits count.
        device: where the set and the batches live.
        dtype: of the images.

    Raises:
        UserError: the batch size is not positive, or ``drop_last`` would leave no batch at all.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None,
        shuffle: bool,
        drop_last: bool,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, got {batch_size}")
        if drop_last and batch_size > len(image_set):
            raise UserError(
                f"the batch size {batch_size} is larger than the set of {len(image_set)} images: "
                "make it smaller"
            )
        self.batch_size, self.drop_last, self.shuffle = batch_size, drop_last, shuffle
        self.augmentation, self.seed, self.epoch = augmentation, seed, 0
        self.device = torch.device(device)
        images = torch.from_numpy(image_set.images)
        self._images: Tensor | None = images.to(self.device)
        self._targets = torch.from_numpy(image_set.targets).to(self.device)
        H, W = images.shape[1:3]
        self._table = torch.from_numpy(normalisation_table(mean, std)).to(self.device, dtype)
        # Where each byte of an image finds its channel's row in the flattened table.
        channel_rows = torch.arange(3, dtype=torch.int32, device=self.device) * 256
        self._table_rows = channel_rows.repeat(H * W)
        # Reused by all batches: on a CPU, fresh pages for it would cost as much as the look-up.
        size = (min(batch_size, len(image_set)), 3 * H * W)
        self._entries = torch.empty(size, dtype=torch.int32, device=self.device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        count = len(self._targets)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self._images is None:
            raise RuntimeError("the loader is closed")
        epoch, count = self.epoch, len(self._targets)
        if self.shuffle:
            order = sample_order(self.seed, epoch, count, self.device)
        else:
            order = torch.arange(count, device=self.device)
        for batch in range(len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self._images.index_select(0, indices)
            if self.augmentation is not None:
                images = self.augmentation.apply(images, self.seed, epoch, indices)
            yield self._normalise(images), self._targets.index_select(0, indices), indices

    def _normalise(self, images: Tensor) -> Tensor:
        B, H, W, _ = images.shape
        entries = torch.add(images.flatten(1), self._table_rows, out=self._entries[:B])
        values = self._table.view(-1).index_select(0, entries.view(-1))
        return values.view(B, H, W, 3).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Give the set's memory back. Closing again is fine; iterating then raises RuntimeError."""
        self._images = self._entries = None

    def __enter__(self) -> ResidentLoader:
        return self

    def __exit__(self, *_) -> None:
        self.close()
