"""CIFAR-10 and CIFAR-100 in the published format: batches pickled by Python 2."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classroomkd.errors import UserError, one_line

SIDE = 32


@dataclass(frozen=True)
class _Layout:
    title: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str  # the key of a batch's labels, and in the meta file, of the class names
    names: str
    torchvision: str
    url: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


LAYOUTS = {
    "cifar10": _Layout(
        title="CIFAR-10",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        names="label_names",
        torchvision="CIFAR10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": _Layout(
        title="CIFAR-100",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels="fine_labels",
        names="fine_label_names",
        torchvision="CIFAR100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
}

Part = tuple[np.ndarray, np.ndarray]


def find(path: Path, kind: str | None = None) -> tuple[_Layout, Path] | None:
    """The layout and folder of the CIFAR files at ``path`` or in its usual sub-folder, if any.

    ``kind`` ("cifar10" or "cifar100") restricts the search to one set. Raises UserError if there
    are several.
    """
    found = [
        (layout, folder)
        for name, layout in LAYOUTS.items()
        if kind in (None, name)
        for folder in (path, path / layout.folder)
        if any((folder / file).is_file() for file in layout.files)
    ]
    if len(found) > 1:
        folders = " and ".join(str(folder) for _, folder in found)
        raise UserError(f"{path} holds more than one data set ({folders}): name one of them")
    return found[0] if found else None


def download(path: Path, kind: str) -> None:
    """Download and check a set with torchvision, unless it is complete in ``path``."""
    layout = LAYOUTS[kind]
    found = find(path, kind)
    if found and all((found[1] / file).is_file() for file in layout.files):
        return
    try:
        from classroomkd.torchvision import import_torchvision

        getattr(import_torchvision("datasets"), layout.torchvision)(
            root=str(path), train=False, download=True
        )
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"could not download {layout.title} into {path} ({one_line(error)}): download "
            f"{layout.url} yourself and unpack it there, so that {path / layout.folder} exists"
        ) from error


def read(layout: _Layout, folder: Path) -> tuple[Part, Part, list[str]]:
    """The training and the test part, each (uint8 [N, 32, 32, 3], int64 [N]), and the classes.

    Raises UserError, naming the file, if one is missing, damaged or not a CIFAR file.
    """
    for file in layout.files:
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not a complete {layout.title} folder: {file} is missing")
    classes = _unpickle(folder / layout.meta).get(layout.names)
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise _damaged(folder / layout.meta, f"no list {layout.names!r}")
    parts = [_read_batch(layout, folder / file, len(classes)) for file in layout.train]
    images, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return (images, targets), _read_batch(layout, folder / layout.test, len(classes)), classes


def _read_batch(layout: _Layout, file: Path, classes: int) -> Part:
    batch = _unpickle(file)
    data, labels = batch.get("data"), batch.get(layout.labels)
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2):
        raise _damaged(file, "no uint8 matrix 'data'")
    if data.shape[1] != 3 * SIDE * SIDE:
        raise _damaged(file, f"images of {data.shape[1]} bytes instead of {3 * SIDE * SIDE}")
    if not (isinstance(labels, list) and len(labels) == len(data)):
        raise _damaged(file, f"no list {layout.labels!r} of {len(data)} labels")
    if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
        raise _damaged(file, f"a label outside 0..{classes - 1}")
    images = data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


# The function that rebuilds arrays; its module depends on the NumPy version.
_reconstruct = np.empty(0).__reduce__()[0]
_REBUILDS_ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and rejects everything else, because a pickle can run any code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _REBUILDS_ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _REBUILDS_ARRAYS[module, name]


def _unpickle(file: Path) -> dict:
    try:
        with file.open("rb") as stream:
            # Python 2 had one type for text and bytes; latin1 preserves both, as NumPy expects.
            content = _ArrayUnpickler(stream, encoding="latin1").load()
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise _damaged(file, one_line(error)) from error
    if not isinstance(content, dict):
        raise _damaged(file, f"it holds a {type(content).__name__} instead of a dictionary")
    return content


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged or not a CIFAR file ({reason}): unpack it again")
