"""Baselines for the loaders: FFCV's operations, torchvision's transforms, and bare copies of bytes.

Each iterates over an epoch of ``(images, targets)``. Images are [B, 3, H, W], channels-last,
normalised, randomly cropped and flipped, on the given device. The last, smaller batch is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classroomkd.data import ImageSet
from classroomkd.data.ffcv.bindings import import_ffcv
from classroomkd.torchvision import import_torchvision

Statistics = tuple[float, float, float]


def ffcv_operations(
    path: Path,
    batch_size: int,
    *,
    workers: int,
    padding: int,
    mean: Statistics,
    std: Statistics,
    device: torch.device,
    dtype: torch.dtype,
):
    """FFCV's loader with its own operations, composed as in its CIFAR example.

    It sets the thread counts of the process. An epoch must be read to its end.
    """
    ffcv = import_ffcv()
    from ffcv import transforms
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder

    to_device = [transforms.ToDevice(device)] if device.type == "cuda" else []
    image = [
        SimpleRGBImageDecoder(),
        transforms.RandomHorizontalFlip(),
        transforms.RandomTranslate(padding=padding),
        transforms.ToTensor(),
        *to_device,
        transforms.ToTorchImage(),
        transforms.Convert(dtype),
        _in_levels(mean, std),
    ]
    label = [IntDecoder(), transforms.ToTensor(), *to_device, transforms.Squeeze(1)]
    return ffcv.Loader(
        str(path),
        batch_size,
        num_workers=workers,
        os_cache=True,
        order=ffcv.loader.OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": image, "label": label},
    )


def _in_levels(mean: Statistics, std: Statistics) -> torch.nn.Module:
    """torchvision's Normalize for values from 0 to 255."""
    normalize = import_torchvision("transforms").Normalize
    return normalize([255 * value for value in mean], [255 * value for value in std])


class TorchvisionTransforms:
    """torchvision's transforms of PIL images in a DataLoader, as most CIFAR code has it."""

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        workers: int,
        padding: int,
        mean: Statistics,
        std: Statistics,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        transforms = import_torchvision("transforms")
        self.device, self.dtype, self.memory_format = device, dtype, memory_format
        transform = transforms.Compose(
            [
                transforms.RandomCrop(image_set.images.shape[1:3], padding),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )
        self._loader = DataLoader(
            _Transformed(image_set, transform),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        for images, targets in self._loader:
            finished = images.to(
                self.device, self.dtype, non_blocking=True, memory_format=self.memory_format
            )
            yield finished, targets.to(self.device, non_blocking=True)


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
