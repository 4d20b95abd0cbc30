"""The resident loader: keeps the set in memory as uint8 and makes each batch in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch

from classroomkd.data.augmentation import AUGMENT, CUTOUT, Augmentation, stream_key
from classroomkd.data.image_sets import ImageSet
from classroomkd.data.loader import Batch, Loader
from classroomkd.errors import UserError
from classroomkd.kernels import triton_obstacle


class ResidentLoader(Loader):
    """Keeps an ``ImageSet`` on ``device``; otherwise as `Loader`.

    On a GPU one kernel launch gathers, augments, normalises and casts a batch; the host copies the
    epoch's order and never waits. The kernel needs Triton 3.4 (3.3 fails to compile its look-up).
    Without it, the loader warns, keeps the set in host memory and makes batches there. Raises
    UserError if ``augmentation`` is a crop of photographs.
    """

    def __init__(self, image_set: ImageSet, batch_size: int, **options) -> None:
        super().__init__(len(image_set), batch_size, **options)
        if self.crop:
            raise UserError("the resident loader cannot crop photographs: use ffcv or torch")
        home = self.device
        if home.type != "cpu" and (reason := triton_obstacle(3, 4)):
            warnings.warn(
                f"{reason}; the resident loader makes its batches on the CPU", stacklevel=2
            )
            home = torch.device("cpu")
        self._images = torch.from_numpy(np.ascontiguousarray(image_set.images)).to(home)
        self._targets = torch.from_numpy(np.ascontiguousarray(image_set.targets)).to(home)
        self._table = self._table.to(home)

    def _iterate(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        make = self._on_cpu if self._images.device.type == "cpu" else self._on_gpu
        return make(batches, epoch)

    def _on_cpu(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        from classroomkd.data.pixels import augment_batch

        size = self._images[0].numel()
        pixels = self._images.view(-1).numpy()
        for indices in batches:
            shape = len(indices), *self._images.shape[1:]
            pinned = self.device.type == "cuda"
            out = torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=pinned)
            starts, augmentation = indices * size, self.augmentation
            augment_batch(pixels, starts, indices, augmentation, self.seed, epoch, self._table, out)
            samples = torch.from_numpy(indices)
            yield self._to_device(out.permute(0, 3, 1, 2), self._targets[samples], samples)

    def _on_gpu(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        from classroomkd.kernels.augment import gather_augment

        if not batches:
            return
        order = torch.from_numpy(np.concatenate(batches))
        if self.device.type == "cuda":
            order = order.pin_memory().to(self.device, non_blocking=True)
            stream = torch.cuda.current_stream(self.device)
            for tensor in (self._images, self._targets, self._table):
                tensor.record_stream(stream)  # it may differ from the one they were made on
        augmentation = self.augmentation or Augmentation(0, flip=False)
        options = {
            **vars(augmentation),
            "augment_key": stream_key(AUGMENT, self.seed, epoch),
            "cutout_key": stream_key(CUTOUT, self.seed, epoch),
        }
        for indices in order.split([len(batch) for batch in batches]):
            images, targets = gather_augment(
                self._images, self._targets, indices, self._table, **options
            )
            yield images, targets, indices

    def close(self) -> None:
        super().close()
        self._images = self._targets = torch.empty(0)
