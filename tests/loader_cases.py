"""Images and loaders that the tests of several loaders share."""

import numpy as np
import pytest

from classroomkd.data import Augmentation, ImageSet, ResidentLoader, TorchLoader
from ffcv_required import requires_ffcv
from interpreter import INTERPRETED

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

OPTIONS = {
    "mean": MEAN,
    "std": STD,
    "augmentation": Augmentation(2, True),
    "shuffle": True,
    "drop_last": False,
}


def random_set(count=23, height=6, width=5, seed=0):
    generator = np.random.default_rng(seed)
    return ImageSet(
        generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8),
        generator.integers(0, 4, count),
        list("abcd"),
    )


class Makers:
    """Makes any kind of loader of a set and closes them all in the end."""

    def __init__(self, folder):
        self.folder, self.opened = folder, []

    def __call__(self, kind, image_set, batch_size=4, **options):
        defaults = {
            "mean": MEAN,
            "std": STD,
            "augmentation": Augmentation(2, True),
            "shuffle": True,
            "drop_last": False,
        }
        options = defaults | options
        name, _, workers = kind.partition("-")
        if workers:
            options["workers"] = int(workers)
        if name == "resident":
            loader = ResidentLoader(image_set, batch_size, **options)
        elif name == "kernel":  # what it does on a GPU, in Triton's interpreter
            loader = ResidentLoader(image_set, batch_size, **options)
            loader._iterate = loader._on_gpu
        elif name == "torch":
            loader = TorchLoader(image_set, batch_size, **options)
        elif name == "map":  # any map-style data set
            pairs = list(zip(image_set.images, image_set.targets.tolist(), strict=True))
            loader = TorchLoader(pairs, batch_size, **options)
        else:
            from classroomkd.data.ffcv.beton import pack
            from classroomkd.data.ffcv.ffcv_loader import FFCVLoader

            path = self.folder / f"{len(self.opened)}.beton"
            pack(image_set, path, overwrite=True)
            loader = FFCVLoader(path, batch_size, **options)
        self.opened.append(loader)
        return loader


FFCV = [pytest.param(kind, marks=requires_ffcv) for kind in ("ffcv-1", "ffcv-3")]


ALL = ["resident", "torch-0", "torch-2", "map-1", *FFCV]


needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for a GPU here")
