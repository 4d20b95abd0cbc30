"""Data sources: class folders, CIFAR's files and scikit-learn's digits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Generic, NamedTuple

import numpy as np

from classroomkd.data import cifar
from classroomkd.data.augmentation import SPLIT, words
from classroomkd.data.class_folders import files_in, folders_below, subfolders
from classroomkd.data.decoding import read_files, resize
from classroomkd.data.image_sets import AnySet, ImageFiles, ImageSet, select
from classroomkd.errors import UserError
from classroomkd.limits import LARGEST_SIDE

_PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""The folder names, in lower case, of the parts of a data set."""


class Parts(NamedTuple, Generic[AnySet]):
    """A data set's training and held-out parts, and its own validation part if it has one.

    ``folders`` names the folder of each part ("train", "validation", "test") that has one.
    """

    train: AnySet
    test: AnySet
    validation: AnySet | None = None
    folders: Mapping[str, str] = MappingProxyType({})

    def sets(self) -> dict[str, AnySet]:
        """The parts that exist, by name, the held-out part last."""
        sets = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in sets.items() if part is not None}


def load_source(
    path: Path | str,
    *,
    image_size: int = 32,
    seed: int = 0,
    test_share: float = 0.2,
    download: str | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Decode the data set at ``path`` into memory; returns its training and held-out parts.

    ``path`` is one of

    - a folder with ``train/`` and ``test/`` or ``val/`` (``test/`` if both exist; `load_parts`
      returns ``val/`` too), each with one folder of images per class;
    - a folder with one folder of images per class. The share ``test_share`` of each class (at
      least one image, at most all but one), selected by ``seed``, becomes the held-out part;
    - the folder of CIFAR-10's or CIFAR-100's Python files, or its parent.

    The parts' folders may also be called ``training``, ``testing``, ``valid`` and ``validation``,
    in any case. Images are PNG, JPEG or WebP, anywhere below the folder of their class. Hidden
    files and folders are skipped; other ignored files are counted on stderr. The classes are the
    sorted folder names. The files of a class are in natural order (2 before 10), those of a folder
    before those of its sub-folders, on every machine. Photographs are rotated upright, transparent
    pixels become white, and 16-bit grey is scaled to 8 bits. Of an image of another size, the
    largest centred square is resampled to ``image_size`` with a Lanczos filter.

    ``download`` ("cifar10" or "cifar100") first downloads that set into ``path`` if it is missing.

    Raises UserError, naming the path, if there is no such data, an image is damaged, there are
    fewer than two classes, the classes of two parts differ, a class is too small to split, or the
    folders of the parts are ambiguous.
    """
    parts = _load(path, image_size, seed, test_share, download, validation=False)
    return parts.train, parts.test


def load_parts(
    path: Path | str,
    *,
    image_size: int = 32,
    seed: int = 0,
    test_share: float = 0.2,
    download: str | None = None,
) -> Parts[ImageSet]:
    """As `load_source`, with the images of ``val/`` if there is a ``test/`` too."""
    return _load(path, image_size, seed, test_share, download, validation=True)


def _load(
    path: Path | str,
    image_size: int,
    seed: int,
    test_share: float,
    download: str | None,
    validation: bool,
) -> Parts[ImageSet]:
    if not 1 <= image_size <= LARGEST_SIDE:
        raise UserError(f"the image size must be within 1..{LARGEST_SIDE} pixels, got {image_size}")
    path = _folder(path, test_share, download)
    found = cifar.find(path, download)
    if found:
        (images, targets), (test_images, test_targets), classes = cifar.read(*found)
        return Parts(
            ImageSet(resize(images, image_size), targets, classes),
            ImageSet(resize(test_images, image_size), test_targets, classes),
        )
    parts = _list_folders(path, seed, test_share)
    return decode(parts if validation else parts._replace(validation=None), image_size)


def decode(parts: Parts[ImageFiles], image_size: int) -> Parts[ImageSet]:
    """The images of all parts in memory, at ``image_size`` × ``image_size`` pixels.

    Raises UserError, naming the file, if an image is damaged.
    """
    listed = parts.sets()
    images = read_files([file for part in listed.values() for file in part.files], image_size)
    decoded, start = {}, 0
    for name, part in listed.items():
        end = start + len(part)
        decoded[name] = ImageSet(images[start:end], part.targets, part.classes)
        start = end
    return Parts(**decoded, folders=parts.folders)


def is_split_by_seed(path: Path | str) -> bool:
    """Whether the data set at ``path`` is split here: one folder, or one of `NAMED_SOURCES`."""
    if str(path) in NAMED_SOURCES:
        return True
    path = Path(path).expanduser()
    return cifar.find(path) is None and "train" not in _part_folders(path)


def digits(seed: int = 0, test_share: float = 1 / 3) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 handwritten digits, split into a training and a held-out part.

    The originals are 8×8 with 17 grey levels. They are scaled to 0..255, resized to 16×16 like
    image files, and repeated over three channels; smaller images make no sense for networks that
    halve them two or three times. The share ``test_share`` of each digit, selected by ``seed``,
    becomes the held-out part.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = resize(np.repeat(grey[..., None], 3, axis=3), 16)
    targets, classes = data.target.astype(np.int64), [str(name) for name in data.target_names]
    test = _held_out(targets, classes, seed, test_share, "the digits")
    train_set, test_set = (ImageSet(images[p], targets[p], classes) for p in (~test, test))
    return train_set, test_set


class NamedSource(NamedTuple):
    """A data set with a name instead of a path.

    ``read`` takes a seed and the held-out share. ``flip`` says whether a mirrored image still shows
    its class; it is the default of ``data.flip``.
    """

    read: Callable[[int, float], tuple[ImageSet, ImageSet]]
    flip: bool


NAMED_SOURCES = {"digits": NamedSource(digits, flip=False)}
"""Data sets that the command line accepts by name."""


def list_source(
    path: Path | str, seed: int = 0, test_share: float = 0.2
) -> tuple[ImageFiles, ImageFiles]:
    """The files of the class folders at ``path``, training and held-out parts, decoded on access.

    Folders, classes, order and split are those of `load_source`; each image keeps its own size.
    Raises UserError as `load_source` does, but finds damaged images only on access.
    """
    parts = list_parts(path, seed, test_share)
    return parts.train, parts.test


def list_parts(path: Path | str, seed: int = 0, test_share: float = 0.2) -> Parts[ImageFiles]:
    """As `list_source`, with the files of ``val/`` if there is a ``test/`` too."""
    path = _folder(path, test_share)
    if cifar.find(path):
        raise UserError(f"{path} holds CIFAR's Python files: there are no image files to list")
    return _list_folders(path, seed, test_share)


def _folder(path: Path | str, test_share: float, download: str | None = None) -> Path:
    """The folder at ``path``, after downloading ``download``; UserError if there is none."""
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


def _part(name: str) -> str | None:
    """The part of a data set that a folder of this name would hold, if any."""
    return next((part for part, names in _PARTS.items() if name.lower() in names), None)


def _part_folders(path: Path) -> dict[str, Path]:
    """The folders below ``path`` that are named like parts of a data set, by the part."""
    found: dict[str, Path] = {}
    for name in subfolders(path):
        if part := _part(name):
            if part in found:
                raise UserError(
                    f"{found[part]} and {path / name} are both named like the {part} part: remove "
                    "or rename one"
                )
            found[part] = path / name
    return found


def _list_folders(path: Path, seed: int, test_share: float) -> Parts[ImageFiles]:
    folders = _part_folders(path)
    train = folders.get("train")
    if train is None:
        for folder in folders.values():
            raise UserError(
                f"{folder} is named like a part of a data set, but there is no train/ next to it: "
                f"name the folder of the training images {path / 'train'} (or rename "
                f"{folder.name}/ if it is a class)"
            )
        both, ignored = _list_classes(path)
        mask = _held_out(both.targets, both.classes, seed, test_share, path)
        ignored.report()
        return Parts(select(both, ~mask), select(both, mask))
    if len(folders) == 1:
        raise UserError(
            f"{path} has {train.name}/ but neither test/ nor val/: give {train} to split it "
            f"by seed (or rename {train.name}/ if it is a class)"
        )
    if "test" not in folders:
        folders["test"] = folders.pop("validation")
    ignored = _Ignored([path / name for name in subfolders(path)], [], [])
    listed = {}
    for part, folder in folders.items():
        ignored.folders.remove(folder)
        remedy = ""
        if part == "test":
            remedy = f", or, if its images have no labels, move {folder.name}/ away"
            if "validation" in folders:
                remedy += f" (then {folders['validation'].name}/ is used)"
        listed[part], others = _list_classes(folder, remedy)
        ignored.others.extend(others.others)
        ignored.loose.extend(others.loose)
    classes = set(listed["train"].classes)
    for part, folder in folders.items():
        for name in sorted(set(listed[part].classes) - classes):
            raise UserError(f"the class {name!r} is in {folder} but not in {train}")
        for name in sorted(classes - set(listed[part].classes)):
            raise UserError(f"the class {name!r} is in {train} but not in {folder}")
    ignored.report()
    names = {part: f"{folder.name}/" for part, folder in folders.items()}
    return Parts(**listed, folders=names)


class _Ignored(NamedTuple):
    """The contents of a data set's folder that are not used."""

    folders: list[Path]
    loose: list[Path]
    others: list[Path]

    def report(self) -> None:
        for what, paths in (
            ("folders ignored (not training, validation or test)", self.folders),
            ("images ignored (in no class folder)", self.loose),
            ("files ignored (not PNG, JPEG or WebP)", self.others),
        ):
            if paths:
                print(f"{what}: {len(paths)} (such as {paths[0]})", file=sys.stderr)


def _check_is_class(path: Path) -> None:
    """Raise UserError if a class folder has parts: its test images would be used for training."""
    parts: dict[str, str] = {}
    for name in subfolders(path):
        parts.setdefault(_part(name) or "", name)
    held_out = parts.get("test") or parts.get("validation")
    if "train" in parts and held_out:
        raise UserError(
            f"the class folder {path} holds {parts['train']}/ and {held_out}/, named like parts of "
            f"a data set: give {path} if it is one, or put the parts above the classes, as "
            f"{path.parent / parts['train'] / path.name} and {path.parent / held_out / path.name}"
        )


def _list_classes(path: Path, remedy: str = "") -> tuple[ImageFiles, _Ignored]:
    """The image files below ``path`` with their classes, and the other files.

    ``remedy`` is further advice for the message if there are fewer than two classes.
    """
    classes = subfolders(path)
    if not classes:
        raise UserError(
            f"no class folders in {path}: put the images of each class in a separate folder, such "
            f"as {path.name}/cat/ and {path.name}/dog/{remedy}"
        )
    files: list[Path] = []
    targets: list[int] = []
    loose, others = files_in(path)
    for target, name in enumerate(classes):
        before = len(files)
        _check_is_class(path / name)
        for folder in folders_below(path / name):
            images, other_files = files_in(folder)
            files += images
            others += other_files
        if len(files) == before:
            raise UserError(f"no PNG, JPEG or WebP images in the class folder {path / name}")
        targets += [target] * (len(files) - before)
    if len(classes) == 1:
        raise UserError(
            f"only one class, {classes[0]!r}, in {path}: at least two are needed{remedy}"
        )
    return ImageFiles(files, np.array(targets, np.int64), classes), _Ignored([], loose, others)


def split_off(image_set: AnySet, share: float, seed: int) -> tuple[AnySet, AnySet]:
    """Split ``image_set`` into the rest and a validation part with the share ``share`` per class.

    The validation part, selected by ``seed``, has at least one image of each class, and at most all
    but one. Raises UserError if a class has only one image.
    """
    mask = split_mask(image_set, share, seed)
    return select(image_set, ~mask), select(image_set, mask)


def split_mask(image_set: ImageSet | ImageFiles, share: float, seed: int) -> np.ndarray:
    """Which samples, bool [N], `split_off` puts into the validation part."""
    return _held_out(image_set.targets, image_set.classes, seed, share, "the training part", 1)


def _held_out(
    targets: np.ndarray,
    classes: list[str],
    seed: int,
    share: float,
    source: object,
    purpose: int = 0,
) -> np.ndarray:
    """A mask [N] of the held-out samples: those of each class with the lowest hash words.

    ``purpose`` replaces the epoch in the hash, so that two splits of a set are independent.
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
