"""Baselines for the loaders: FFCV's operations, torchvision's transforms, and bare copies of bytes.

Each iterates over an epoch of ``(images, targets)``. Images are [B, 3, H, W], channels-last,
normalised, randomly cropped and flipped, on the given device. The last, smaller batch is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classroomkd.data import ImageSet
from classroomkd.data.ffcv.bindings import import_ffcv
from classroomkd.torchvision import import_torchvision

Statistics = tuple[float, float, float]


class How(NamedTuple):
    """How batches are made; ``mean`` and ``std`` are those of values from 0 to 1."""

    batch_size: int
    workers: int
    padding: int
    mean: Statistics
    std: Statistics
    device: torch.device
    dtype: torch.dtype


def ffcv_operations(path: Path, how: How):
    """FFCV's loader with its own operations, composed as in its CIFAR example.

    It sets the thread counts of the process. An epoch must be read to its end.
    """
    ffcv = import_ffcv()
    from ffcv import transforms
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder

    to_device = [transforms.ToDevice(how.device)] if how.device.type == "cuda" else []
    # torchvision's Normalize for values from 0 to 255.
    levels = ([255 * value for value in values] for values in (how.mean, how.std))
    image = [
        SimpleRGBImageDecoder(),
        transforms.RandomHorizontalFlip(),
        transforms.RandomTranslate(padding=how.padding),
        transforms.ToTensor(),
        *to_device,
        transforms.ToTorchImage(),
        transforms.Convert(how.dtype),
        import_torchvision("transforms").Normalize(*levels),
    ]
    label = [IntDecoder(), transforms.ToTensor(), *to_device, transforms.Squeeze(1)]
    return ffcv.Loader(
        str(path),
        how.batch_size,
        num_workers=how.workers,
        os_cache=True,
        order=ffcv.loader.OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": image, "label": label},
    )


class TorchvisionTransforms:
    """torchvision's transforms of PIL images in a DataLoader, as most CIFAR code has it."""

    def __init__(
        self,
        image_set: ImageSet,
        how: How,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        transforms = import_torchvision("transforms")
        self._how, self._memory_format = how, memory_format
        transform = transforms.Compose(
            [
                transforms.RandomCrop(image_set.images.shape[1:3], how.padding),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(how.mean, how.std),
            ]
        )
        self._loader = DataLoader(
            _Transformed(image_set, transform),
            how.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=how.workers,
            persistent_workers=True,
            pin_memory=how.device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        at_once = {"device": self._how.device, "non_blocking": True}
        for images, targets in self._loader:
            finished = images.to(
                dtype=self._how.dtype, memory_format=self._memory_format, **at_once
            )
            yield finished, targets.to(**at_once)


class _Transformed(Dataset):
    """Arrays in memory, converted to PIL images one by one, as in torchvision's CIFAR data sets."""

    def __init__(self, image_set: ImageSet, transform) -> None:
        self.image_set, self.transform = image_set, transform

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        pixels, target = self.image_set[index]
        return self.transform(Image.fromarray(pixels)), target


class BareCopy:
    """Copies contiguous batches of bytes, each byte as often as an output number has bytes.

    This is the least that any loader on the CPU must read and write. Nothing is gathered or
    computed, and the output memory is always the same.
    """

    def __init__(self, images: Tensor, batch_size: int, threads: int, dtype: torch.dtype) -> None:
        torch.set_num_threads(threads)
        whole = len(images) // batch_size * batch_size
        self._batches = images[:whole].view(whole // batch_size, -1)
        self._out = torch.empty((dtype.itemsize, self._batches.shape[1]), dtype=torch.uint8)
        self._count = range(batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, range]]:
        for batch in self._batches:
            yield self._out.copy_(batch.expand_as(self._out)), self._count


class DeviceCopy:
    """Copies within GPU memory, as many bytes as reading and writing ``count`` images needs.

    The pieces are too large for the cache.
    """

    def __init__(self, count: int, bytes_per_image: int, device: torch.device) -> None:
        n_bytes = min(2**30, torch.cuda.mem_get_info()[0] // 4)
        self._source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
        self._out = torch.empty_like(self._source)
        self._images = range(2 * n_bytes // bytes_per_image)
        self._pieces = -(-count // len(self._images))

    def __iter__(self) -> Iterator[tuple[Tensor, range]]:
        for _ in range(self._pieces):
            yield self._out.copy_(self._source), self._images


class PinnedCopy:
    """Copies of finished batches from pinned memory to the GPU."""

    def __init__(
        self, count: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._finished = [torch.zeros(*shape, dtype=dtype).pin_memory() for _ in range(4)]
        self._device, self._batches, self._images = device, count // shape[0], range(shape[0])

    def __iter__(self) -> Iterator[tuple[Tensor, range]]:
        for batch in range(self._batches):
            finished = self._finished[batch % len(self._finished)]
            yield finished.to(self._device, non_blocking=True), self._images
