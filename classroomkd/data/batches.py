"""Batches from a user's DataLoader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from classroomkd.data.loader import Batch, Loader
from classroomkd.errors import UserError


class Batches:
    """A part of a run's images that is only available from a DataLoader of (images, targets).

    ``classes`` are the class names, and ``what`` is the part: "train", which may also have class
    probabilities and rows to ignore, or another. ``example`` has the first images, at most two.

    Raises UserError if the DataLoader has no length, or returns anything else.
    """

    def __init__(self, loader: DataLoader, classes: Sequence[str], what: str) -> None:
        self.loader, self.classes, self.what = loader, list(classes), what
        self._first, targets = first_batch(loader, what)
        self.require_classes(targets)
        self.example = (
            self._first[:2].float() if self._first.is_floating_point() else self._first[:2]
        )

    @property
    def batch_size(self) -> int:
        """The number of images in a full batch."""
        return len(self._first)

    def __len__(self) -> int:
        """The number of images in an epoch; an incomplete last batch may be counted as full."""
        sampler = self.loader.sampler
        whole = len(self.loader) * self.batch_size
        return whole if self.loader.batch_size is None else min(whole, len(sampler))  # type: ignore[arg-type]

    def require_classes(self, targets: Tensor) -> None:
        """Raise UserError for a target that is no class's index, nor anything else allowed."""
        if targets.is_floating_point():
            if self.what != "train":
                raise UserError(f"{self.what} gives class probabilities: give class indices [B]")
            return
        if not targets.is_cpu:  # looking would wait for the GPU
            return
        wrong = (targets < 0) | (targets >= len(self.classes))
        if self.what == "train":
            wrong &= targets != -100
        if wrong.any():
            raise UserError(
                f"{self.what} gives the target {int(targets[wrong][0])}: class indices are from 0 "
                f"to {len(self.classes) - 1}, as there are {len(self.classes)} classes"
            )

    def digest(self) -> str:
        """A SHA-256, in hexadecimal, of known properties of the batches, not of their content."""
        known = [self.classes, len(self), list(self._first.shape[1:])]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def first_batch(loader: DataLoader, what: str) -> tuple[Tensor, Tensor]:
    """Images [B, …] and targets of the first batch; the random number generator is unchanged.

    Raises UserError, naming the DataLoader ``what``, if it returns no such batch or has no length.
    """
    try:
        len(loader)
    except TypeError:
        raise UserError(
            f"{what} has no length, which schedules need: give its data set a __len__"
        ) from None
    with torch.random.fork_rng(devices=[]):
        batch: Any = next(iter(loader), None)
    pair = isinstance(batch, list | tuple) and len(batch) >= 2
    if not pair or not all(isinstance(part, Tensor) for part in batch[:2]):
        kind = "nothing" if batch is None else type(batch).__name__
        raise UserError(f"{what} must give (images, targets), two tensors, not {kind}")
    images, targets = batch[:2]
    fits = targets.dim() == (2 if targets.is_floating_point() else 1)
    if len(targets) != len(images) or not fits:
        raise UserError(
            f"{what} gives targets {list(targets.shape)} of {targets.dtype} for {len(images)} "
            "images: they must be class indices [B], or class probabilities [B, classes]"
        )
    return images, targets


class BatchLoader(Loader):
    """The batches of a DataLoader, unchanged, on ``device``; floating-point images in ``dtype``.

    Sample indices are -1. At the start of an iteration, torch and the DataLoader's generator are
    seeded from ``seed`` and the epoch, so that a run resumes at an epoch as if never interrupted.
    """

    seekable = False

    def __init__(self, batches: Batches, **options: Any) -> None:
        known: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        known |= {"augmentation": None, "drop_last": False}
        super().__init__(len(batches), batches.batch_size, **known, **options)
        self._part, self._loader = batches, batches.loader
        self.one_shape = self._loader.drop_last

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, which starts at its beginning."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self._require_open()
        if self.shuffle:  # a training: measuring leaves the random numbers alone
            entropy = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
            torch.manual_seed(int(entropy[0]))
            if self._loader.generator is not None:
                self._loader.generator.manual_seed(int(entropy[0]))
        if hasattr(self._loader.sampler, "set_epoch"):
            self._loader.sampler.set_epoch(self.epoch)
        return self._iterate([], self.epoch)

    def _iterate(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        for images, targets, *_ in self._loader:
            self._part.require_classes(targets)
            if images.is_floating_point():
                images = images.to(self.dtype)
            yield self._to_device(images, targets, torch.full((len(targets),), -1))


class BatchLoaders:
    """Opens loaders of `Batches`, as `Loaders` does for images."""

    backend, reason = "batches", "as the DataLoaders give them"

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def open(self, batches: Batches, batch_size: int, **options: Any) -> BatchLoader:
        """A loader of ``batches``, with the options of `Loader` that apply to it."""
        taken = {key: options[key] for key in ("shuffle", "seed", "dtype") if key in options}
        return BatchLoader(batches, device=self.device, **taken)
