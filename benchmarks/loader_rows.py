"""The rows of the loader benchmark, each in its own process."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classroomkd.data import Augmentation, ImageSet, ResidentLoader, TorchLoader, channel_statistics
from classroomkd.data.augmentation import AUGMENT, normalisation_table, sample_order, stream_key
from loader_baselines import (
    BareCopy,
    DeviceCopy,
    How,
    PinnedCopy,
    TorchvisionTransforms,
    ffcv_operations,
)
from measure import graph_time, host_time, synchronize

PADDING = 4
SHORTEST = 0.3  # seconds; a round repeats epochs until then


@dataclass(frozen=True)
class Setting:
    """What all rows share. The images are stored in ``folder``."""

    folder: Path
    count: int
    shape: tuple[int, int, int]  # height, width, 3
    batch: int
    workers: int
    device: torch.device
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(
        cls, folder: Path, image_set: ImageSet, batch: int, workers: int, device: torch.device
    ) -> Setting:
        """The setting of a set of images, which are written to ``folder``."""
        shape, statistics = image_set.images.shape[1:], channel_statistics(image_set)
        np.save(folder / "images.npy", image_set.images)
        np.save(folder / "targets.npy", image_set.targets)
        (folder / "classes.json").write_text(json.dumps(image_set.classes), encoding="utf-8")
        return cls(folder, len(image_set), shape, batch, workers, device, *statistics)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def beton(self) -> Path:
        return self.folder / "images.beton"

    def images(self) -> ImageSet:
        """The images, in memory."""
        arrays = [np.load(self.folder / f"{name}.npy") for name in ("images", "targets")]
        return ImageSet(*arrays, json.loads((self.folder / "classes.json").read_text("utf-8")))

    def how(self, workers: int) -> How:
        """How a baseline makes batches of these images."""
        like = self.mean, self.std, self.device, self.dtype
        return How(self.batch, workers, PADDING, *like)

    def bytes_per_image(self, floor: str) -> int:
        """The bytes a floor moves: bytes in and numbers out, or only numbers over the bus."""
        values = math.prod(self.shape)
        return values * (self.dtype.itemsize + (floor != "pinned copy"))


# Each row's function prepares everything that is not timed, and returns a function that opens the
# loader.
Opener = Callable[[], Iterable]


def _bare_copy(setting: Setting, threads: int) -> Opener:
    images = torch.from_numpy(setting.images().images)
    return lambda: BareCopy(images, setting.batch, threads, setting.dtype)


def _device_copy(setting: Setting, workers: int) -> Opener:
    n_bytes = setting.bytes_per_image("device copy")
    return lambda: DeviceCopy(setting.count, n_bytes, setting.device)


def _pinned_copy(setting: Setting, workers: int) -> Opener:
    shape = setting.batch, *setting.shape
    return lambda: PinnedCopy(setting.count, shape, setting.device, setting.dtype)


def _options(setting: Setting) -> dict[str, Any]:
    return {
        "mean": setting.mean,
        "std": setting.std,
        "augmentation": Augmentation(PADDING, True),
        "shuffle": True,
        "drop_last": True,
        "device": setting.device,
        "dtype": setting.dtype,
    }


def _resident(setting: Setting, workers: int) -> Opener:
    images = setting.images()
    return lambda: ResidentLoader(images, setting.batch, **_options(setting))


def _torch(setting: Setting, workers: int) -> Opener:
    images = setting.images()
    return lambda: TorchLoader(images, setting.batch, workers=workers, **_options(setting))


def _ffcv(setting: Setting, workers: int) -> Opener:
    def open_it() -> Iterable:
        from classroomkd.data.ffcv.ffcv_loader import FFCVLoader

        return FFCVLoader(setting.beton, setting.batch, workers=workers, **_options(setting))

    return open_it


def _baseline(make: Callable[..., Iterable], setting: Setting, workers: int) -> Opener:
    data = setting.beton if make is ffcv_operations else setting.images()
    return partial(make, data, setting.how(workers))


STOCK = "FFCV's operations"
OPENERS: dict[str, Callable[[Setting, int], Opener]] = {
    "bare copy": _bare_copy,
    "device copy": _device_copy,
    "pinned copy": _pinned_copy,
    "resident": _resident,
    "ffcv": _ffcv,
    "torch": _torch,
    STOCK: partial(_baseline, ffcv_operations),
    "torchvision's transforms": partial(_baseline, TorchvisionTransforms),
}
FLOORS = ("bare copy", "device copy", "pinned copy")


def floor_of(name: str, device: torch.device) -> str:
    """The bare copy that bounds a row."""
    if device.type == "cpu":
        return "bare copy"
    return "device copy" if name == "resident" else "pinned copy"


def row_names(setting: Setting) -> list[tuple[str, int]]:
    """Loader and number of workers of each row; 0 means the caller's thread only."""
    one_and_all = sorted({1, setting.workers})
    gpu = setting.device.type == "cuda"
    return [
        *((("device copy", 0), ("pinned copy", 0)) if gpu else ()),
        *(() if gpu else (("bare copy", threads) for threads in one_and_all)),
        ("resident", 0),
        *(("ffcv", workers) for workers in one_and_all),
        ("torch", setting.workers),
        *((STOCK, workers) for workers in one_and_all),
        ("torchvision's transforms", setting.workers),
    ]


class RunningLoader:
    """A row's loader, opened, read and timed on request of the main process."""

    def __init__(self, setting: Setting, name: str, workers: int) -> None:
        self.setting, self.name, self.workers = setting, name, workers
        self.loader: Any = None
        self.epochs = 0

    def open(self) -> dict[str, Any]:
        """Open a new loader and read its first batch."""
        self.close()
        opener = OPENERS[self.name](self.setting, self.workers)
        self.gpu_before = self._gpu_bytes(torch.cuda.memory_allocated)
        opened_at, start = time.time(), time.perf_counter()
        self.loader = opener()
        del opener  # it holds the images
        self.batches = iter(self.loader)
        self.batch = next(self.batches)
        synchronize()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "compiled": self._compiled_since(opened_at)}

    def finish(self) -> int | None:
        """Read the rest of the epoch; returns the peak GPU memory in bytes since `open`."""
        for batch in self.batches:
            self.batch = batch
        synchronize()
        self._check(self.batch[0])
        if self.setting.device.type == "cpu":
            return None
        return self._gpu_bytes(torch.cuda.max_memory_allocated) - self.gpu_before

    def round(self) -> float:
        """Time one round, in images per second."""
        self.batch = self.batches = None
        count, start = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - start < SHORTEST:
            self.epochs += 1
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(self.epochs)
            for batch in self.loader:
                count += len(batch[1])
            synchronize()
        return count / (time.perf_counter() - start)

    def close(self) -> None:
        self.batch = self.batches = None
        if hasattr(self.loader, "close"):
            self.loader.close()
        self.loader = None
        gc.collect()

    def _gpu_bytes(self, count: Callable[[], int]) -> int:
        return count() if self.setting.device.type == "cuda" else 0

    def _compiled_since(self, opened_at: float) -> bool:
        """Whether code was compiled instead of found on disk."""
        if self.name == STOCK:  # compiles for each loader and caches nothing
            return True
        if self.name not in ("resident", "ffcv", "torch"):
            return False
        if self.name == "resident" and self.setting.device.type == "cuda":
            default = Path.home() / ".triton" / "cache"
            files = Path(os.environ.get("TRITON_CACHE_DIR", default)).rglob("*.json")
        else:
            import classroomkd.data.pixels as pixels

            files = Path(pixels._augment.stats.cache_path).glob("*.nb?")
        return any(file.stat().st_mtime >= opened_at for file in files)

    def _check(self, images: torch.Tensor) -> None:
        """Raise ArithmeticError if the batch has the wrong shape, dtype, device or values."""
        if self.name in FLOORS:
            return
        setting = self.setting
        height, width, _ = setting.shape
        right = (
            images.shape == (setting.batch, 3, height, width)
            and images.dtype == setting.dtype
            and images.device.type == setting.device.type
            and images.is_contiguous(memory_format=torch.channels_last)
        )
        # Every batch has a black border somewhere, unless so few images that none is shifted.
        mean, std = torch.tensor(setting.mean), torch.tensor(setting.std)
        lowest, highest = (op(images.float().cpu(), (0, 2, 3)) for op in (torch.amin, torch.amax))
        normalised = torch.allclose(lowest, -mean / std, rtol=0.01)
        if not right or not normalised or (highest > 1.01 * (1 - mean) / std).any():
            raise ArithmeticError(
                f"a batch of {images.dtype} {list(images.shape)} on {images.device}, "
                f"values {lowest.tolist()} to {highest.tolist()}"
            )


class Kernel:
    """The resident loader's GPU kernel alone, at one image size."""

    def __init__(self, setting: Setting, size: int) -> None:
        self.setting, self.size = setting, size

    def measure(self) -> dict[str, Any]:
        """Time of one batch in µs, on the GPU and on the host."""
        from classroomkd.kernels.augment import gather_augment

        setting, size = self.setting, self.size
        fitting = torch.cuda.mem_get_info()[0] // 4 // (3 * size * size)
        count = min(setting.count, fitting) // setting.batch * setting.batch
        images = torch.randint(
            256, (count, size, size, 3), dtype=torch.uint8, device=setting.device
        )
        targets = torch.zeros(count, dtype=torch.int64, device=setting.device)
        table = torch.from_numpy(normalisation_table(setting.mean, setting.std))
        table = table.to(setting.device, setting.dtype)
        order = torch.from_numpy(sample_order(0, 0, count)).to(setting.device)
        options = vars(Augmentation(PADDING, True))
        keys = {"augment_key": stream_key(AUGMENT, 0, 0), "cutout_key": 0}

        def call(indices: torch.Tensor) -> object:
            return gather_augment(images, targets, indices, table, **options, **keys)

        # Enough batches that none is still in the cache when it is read again.
        sets = [(indices,) for indices in order.split(setting.batch)]
        return {
            "images": count,
            "graph_us": graph_time(call, sets) * 1e6,
            "host_us": host_time(call, sets) * 1e6,
        }
