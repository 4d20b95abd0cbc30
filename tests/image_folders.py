"""Image folders and CIFAR files, written for a test."""

from __future__ import annotations

import io
import pickle
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image


def write_classes(root: Path, count: int, classes=("cat", "dog", "eel"), seed: int = 0) -> Path:
    """Folders of noise images, each class brighter than the one before."""
    rng = np.random.default_rng(seed)
    for level, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 156, (8, 8, 3)) + 50 * level
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: text and bytes as one string type, protocol 2."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)
    numpy_module = "numpy.core.multiarray"

    def save_string(self, value):
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    def save_global(self, value, name=None):
        module = self.numpy_module if value.__name__ == "_reconstruct" else "numpy"
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[type] = dispatch[types.BuiltinFunctionType] = save_global


def python2(path, content, pickler=Python2Pickler):
    buffer = io.BytesIO()
    pickler(buffer, protocol=2).dump(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def make_cifar(root, kind, pickler=Python2Pickler):
    """Five images a file, of random pixels; returns the training and the test images."""
    generator = np.random.default_rng(0)
    fine = kind == "cifar100"
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    names = [f"class {i:02}" for i in range(100 if fine else 10)]
    python2(
        folder / ("meta" if fine else "batches.meta"),
        {"fine_label_names": names, "coarse_label_names": ["x"]}
        if fine
        else {"label_names": names},
        pickler,
    )
    train_files = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    made = {}
    for number, file in enumerate([*train_files, "test" if fine else "test_batch"]):
        made[file] = generator.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
        labels = [(7 * number + i) % len(names) for i in range(5)]
        planes = np.ascontiguousarray(made[file].transpose(0, 3, 1, 2)).reshape(5, 3072)
        batch = {"data": planes, "filenames": ["a.png"] * 5}
        batch |= {"fine_labels": labels, "coarse_labels": [0] * 5} if fine else {"labels": labels}
        python2(folder / file, batch, pickler)
    *train, test = made.values()
    return folder, np.concatenate(train), test
