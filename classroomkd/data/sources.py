"""Where images come from: class folders, CIFAR's files, and scikit-learn's digits."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np

from classroomkd.data import cifar
from classroomkd.data.augment import SPLIT, words
from classroomkd.data.decode import SUFFIXES, read_files, resize
from classroomkd.data.image_sets import ImageFiles, ImageSet, select
from classroomkd.errors import UserError

LARGEST = 1024  # pixels a side; larger sets would hardly fit in memory


def load_source(
    path: Path | str,
    *,
    image_size: int = 32,
    seed: int = 0,
    test_share: float = 0.2,
    download: str | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Decode the data set at ``path`` into memory and return its training and its held-out part.

    ``path`` is one of

    - a folder with ``train/`` and ``test/`` or ``val/`` (of these two, ``test/`` where both exist),
      each with a folder of images a class;
    - a folder with a folder of images a class, of which each class gives the share ``test_share``
      (at least one image, at most all but one), chosen by ``seed``, to the held-out part;
    - the folder of CIFAR-10's or CIFAR-100's Python files, or the folder around it.

    Images are PNG, JPEG or WebP; a line on stderr counts the files passed over for being neither.
    The classes are the sorted folder names, the files of a class in natural order (2 before 10), so
    the arrays are the same on every machine. Photographs are turned upright, transparent pixels
    laid on white, 16-bit grey scaled to 8 bits; an image of another size gives its largest centred
    square, resampled to ``image_size`` with an antialiasing (Lanczos) filter.

    ``download`` ("cifar10" or "cifar100") fetches that set into ``path`` first, if not there.

    Raises UserError, naming the path, if there is no such data, an image is damaged, there are
    fewer than two classes, the classes of the two parts differ, or a class is too small to split.
    """
    if not 1 <= image_size <= LARGEST:
        raise UserError(f"the image size must be within 1..{LARGEST} pixels, got {image_size}")
    path = _folder(path, test_share, download)
    found = cifar.find(path, download)
    if found:
        train, test, classes = cifar.read(*found)
        return tuple(
            ImageSet(resize(part[0], image_size), part[1], classes) for part in (train, test)
        )
    train, test = _list_folders(path, seed, test_share)
    images = read_files(train.files + test.files, image_size)
    return (
        ImageSet(images[: len(train)], train.targets, train.classes),
        ImageSet(images[len(train) :], test.targets, test.classes),
    )


def is_split_by_seed(path: Path | str) -> bool:
    """Whether the data set at ``path`` is split here: one folder, or one of `NAMED_SOURCES`."""
    if str(path) in NAMED_SOURCES:
        return True
    path = Path(path).expanduser()
    return cifar.find(path) is None and "train" not in _subfolders(path)


def digits(seed: int = 0, test_share: float = 1 / 3) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 handwritten digits, split into a training and a held-out part.

    The originals are 8×8 with 17 grey levels. They are scaled to 0..255, doubled to 16×16 with the
    filter that files are resized with, and repeated over three channels, which is the smallest
    size that networks with two or three halvings still make sense on. Each digit gives the share
    ``test_share`` to the held-out part, chosen by ``seed``.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = resize(np.repeat(grey[..., None], 3, axis=3), 16)
    targets, classes = data.target.astype(np.int64), [str(name) for name in data.target_names]
    test = _held_out(targets, classes, seed, test_share, "the digits")
    return tuple(ImageSet(images[part], targets[part], classes) for part in (~test, test))


NAMED_SOURCES = {"digits": digits}
"""What the command line takes by a word instead of a path: functions of seed and held-out share."""


def list_source(
    path: Path | str, seed: int = 0, test_share: float = 0.2
) -> tuple[ImageFiles, ImageFiles]:
    """The files of the class folders at ``path``, training and held-out part, decoded on use.

    Folders, classes, order and split are those of `load_source`; each image keeps its own size.
    Raises UserError as `load_source` does, but finds a damaged image only when it is asked for.
    """
    path = _folder(path, test_share)
    if cifar.find(path):
        raise UserError(f"{path} holds CIFAR's Python files: there are no image files to list")
    return _list_folders(path, seed, test_share)


def _folder(path: Path | str, test_share: float, download: str | None = None) -> Path:
    """The folder at ``path``, into which ``download`` is fetched first; UserError if none."""
    path = Path(path).expanduser()
    if not 0 < test_share < 1:
        raise UserError(f"the held-out share must be between 0 and 1, got {test_share}")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: give the folder that holds the data set")
    if download is not None:
        if download not in cifar.LAYOUTS:
            raise UserError(f"cannot download {download!r}: only {' and '.join(cifar.LAYOUTS)}")
        cifar.download(path, download)
    if not path.exists():
        raise UserError(f"no such folder: {path}")
    return path


def _list_folders(path: Path, seed: int, test_share: float) -> tuple[ImageFiles, ImageFiles]:
    folders = _subfolders(path)
    if "train" in folders:
        held_out = next((path / name for name in ("test", "val") if name in folders), None)
        if held_out is None:
            raise UserError(
                f"{path} has train/ but neither test/ nor val/: give {path / 'train'} to split it "
                "by seed (or rename train/ if it is a class)"
            )
        train, others = _list_classes(path / "train")
        test, test_others = _list_classes(held_out)
        others += test_others
        for name in sorted(set(test.classes) - set(train.classes)):
            raise UserError(f"the class {name!r} is in {held_out} but not in {path / 'train'}")
        for name in sorted(set(train.classes) - set(test.classes)):
            raise UserError(f"the class {name!r} is in {path / 'train'} but not in {held_out}")
    else:
        both, others = _list_classes(path)
        mask = _held_out(both.targets, both.classes, seed, test_share, path)
        train, test = select(both, ~mask), select(both, mask)
    if others:
        print(
            f"files passed over, as not PNG, JPEG or WebP: {len(others)} ({others[0]} for one)",
            file=sys.stderr,
        )
    return train, test


def _subfolders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _file_names(path: Path) -> tuple[list[str], list[str]]:
    """A folder's image files in natural order, in which digits compare as numbers, and the others.

    Hidden files are neither.
    """
    images, others = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.is_dir():
                continue
            is_image = entry.name.lower().endswith(SUFFIXES)
            if is_image and not entry.is_file():
                raise UserError(
                    f"{path / entry.name} is no file, or a link to one that is not there: remove it"
                )
            (images if is_image else others).append(entry.name)

    def natural(name: str) -> tuple[list[int | str], str]:
        parts = re.split("([0-9]+)", name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], name

    return sorted(images, key=natural), sorted(others)


def _list_classes(path: Path) -> tuple[ImageFiles, list[Path]]:
    """The image files below ``path`` with their classes, and the other files."""
    classes = _subfolders(path)
    if not classes:
        raise UserError(
            f"no class folders in {path}: put the images of each class in a folder of its own, in "
            f"{path.name}/cat/ and {path.name}/dog/ for two"
        )
    files, targets, others = [], [], []
    for target, name in enumerate(classes):
        names, other_names = _file_names(path / name)
        if not names:
            raise UserError(f"no PNG, JPEG or WebP images in the class folder {path / name}")
        files += [path / name / file for file in names]
        targets += [target] * len(names)
        others += [path / name / file for file in other_names]
    if len(classes) == 1:
        raise UserError(f"only one class, {classes[0]!r}, in {path}: at least two are needed")
    return ImageFiles(files, np.array(targets, np.int64), classes), others


def split_off(
    image_set: ImageSet | ImageFiles, share: float, seed: int
) -> tuple[ImageSet, ImageSet] | tuple[ImageFiles, ImageFiles]:
    """The rest of ``image_set``, and its validation part: of each class the share ``share``.

    At least one image a class, and at most all but one, chosen by ``seed``. Raises UserError if a
    class has only one.
    """
    mask = _held_out(image_set.targets, image_set.classes, seed, share, "the training part", 1)
    return select(image_set, ~mask), select(image_set, mask)


def _held_out(
    targets: np.ndarray,
    classes: list[str],
    seed: int,
    share: float,
    source: object,
    purpose: int = 0,
) -> np.ndarray:
    """A mask [N] of the held-out samples: of each class, those of the lowest hash words.

    ``purpose`` stands in the epoch's place: one split of a set says nothing of another.
    """
    order = words(SPLIT, seed, purpose, np.arange(len(targets)))
    mask = np.zeros(len(targets), bool)
    for target, name in enumerate(classes):
        members = np.flatnonzero(targets == target)
        if len(members) < 2:
            raise UserError(
                f"the class {name!r} in {source} has one image: two are needed to split"
            )
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        mask[members[np.argsort(order[members])[:count]]] = True
    return mask
