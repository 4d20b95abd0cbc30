"""Where images come from: class folders, CIFAR's files, and scikit-learn's digits."""

from __future__ import annotations

import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from classroomkd.data import cifar
from classroomkd.data.augment import SPLIT, words
from classroomkd.errors import UserError

_FORMATS = ("PNG", "JPEG", "WEBP")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LARGEST = 1024  # pixels a side; larger sets would hardly fit in memory
_CHUNK = 64  # images a thread decodes before it reports


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images: uint8 [N, H, W, 3] RGB, int64 [N] class indices, and the class names."""

    images: np.ndarray
    targets: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.targets)


def join(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of both parts of a data set, in order."""
    images = np.concatenate((first.images, second.images))
    return ImageSet(images, np.concatenate((first.targets, second.targets)), first.classes)


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
    path = Path(path).expanduser()
    if not 1 <= image_size <= _LARGEST:
        raise UserError(f"the image size must be within 1..{_LARGEST} pixels, got {image_size}")
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
    found = cifar.find(path, download)
    if found:
        train, test, classes = cifar.read(*found)
        return tuple(
            ImageSet(_resize(part[0], image_size), part[1], classes) for part in (train, test)
        )
    return _load_folders(path, image_size, seed, test_share)


def is_split_by_seed(path: Path | str) -> bool:
    """Whether `load_source` has to split the data set at ``path``, for it is one folder."""
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
    images = _resize(np.repeat(grey[..., None], 3, axis=3), 16)
    targets, classes = data.target.astype(np.int64), [str(name) for name in data.target_names]
    test = _held_out(targets, classes, seed, test_share, "the digits")
    return tuple(ImageSet(images[part], targets[part], classes) for part in (~test, test))


def _load_folders(path: Path, size: int, seed: int, test_share: float) -> tuple[ImageSet, ImageSet]:
    folders = _subfolders(path)
    if "train" in folders:
        held_out = next((path / name for name in ("test", "val") if name in folders), None)
        if held_out is None:
            raise UserError(
                f"{path} has train/ but neither test/ nor val/: give {path / 'train'} to split it "
                "by seed (or rename train/ if it is a class)"
            )
        files, targets, classes, others = _list_classes(path / "train")
        test_files, test_targets, test_classes, test_others = _list_classes(held_out)
        others += test_others
        for name in sorted(set(test_classes) - set(classes)):
            raise UserError(f"the class {name!r} is in {held_out} but not in {path / 'train'}")
        for name in sorted(set(classes) - set(test_classes)):
            raise UserError(f"the class {name!r} is in {path / 'train'} but not in {held_out}")
    else:
        files, targets, classes, others = _list_classes(path)
        held_out = _held_out(targets, classes, seed, test_share, path)
        test_files, test_targets = [files[i] for i in np.flatnonzero(held_out)], targets[held_out]
        files, targets = [files[i] for i in np.flatnonzero(~held_out)], targets[~held_out]
    if others:
        print(
            f"files passed over, as not PNG, JPEG or WebP: {len(others)} ({others[0]} for one)",
            file=sys.stderr,
        )
    images = _decode(files + test_files, size)
    train, test = images[: len(files)], images[len(files) :]
    return ImageSet(train, targets, classes), ImageSet(test, test_targets, classes)


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
            is_image = entry.name.lower().endswith(_SUFFIXES)
            if is_image and not entry.is_file():
                raise UserError(
                    f"{path / entry.name} is no file, or a link to one that is not there: remove it"
                )
            (images if is_image else others).append(entry.name)

    def natural(name: str) -> tuple[list[int | str], str]:
        parts = re.split("([0-9]+)", name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], name

    return sorted(images, key=natural), sorted(others)


def _list_classes(path: Path) -> tuple[list[Path], np.ndarray, list[str], list[Path]]:
    """The image files below ``path``, their class indices, the classes, and the other files."""
    classes = _subfolders(path)
    if not classes:
        images, _ = _file_names(path)
        hint = ": put the images of each class in a folder of its own" if images else ""
        raise UserError(f"no class folders in {path}{hint}")
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
    return files, np.array(targets, np.int64), classes, others


def _held_out(
    targets: np.ndarray, classes: list[str], seed: int, share: float, source: object
) -> np.ndarray:
    """A mask [N] of the held-out samples: of each class, those of the lowest hash words."""
    order = words(SPLIT, seed, 0, torch.arange(len(targets))).numpy()
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


def _decode(files: list[Path], size: int) -> np.ndarray:
    """Decode all files into uint8 [N, size, size, 3]; UserError names the first that fails."""
    images = np.empty((len(files), size, size, 3), np.uint8)

    def decode(start: int) -> list[str]:
        failures = []
        for i in range(start, min(start + _CHUNK, len(files))):
            try:
                images[i] = _read_image(files[i], size)
            except UnidentifiedImageError:
                failures.append(f"{files[i]} is not a PNG, JPEG or WebP image")
            except Exception as error:  # decoders raise almost anything on damaged bytes
                reason = " ".join(str(error).split()) or type(error).__name__
                failures.append(f"{files[i]} cannot be read ({reason})")
        return failures

    starts = range(0, len(files), _CHUNK)
    console = Console(stderr=True)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        chunks = track(
            pool.map(decode, starts),
            description=f"Reading {len(files):,} images",
            total=len(starts),
            console=console,
            transient=True,
            disable=not console.is_terminal or len(files) < 1000,
        )
        failures = [failure for chunk in chunks for failure in chunk]
    if failures:
        others = len(failures) - 1
        more = f"; {others} more cannot be read either" if others else ""
        raise UserError(f"{failures[0]}{more}: replace or remove {'them' if others else 'it'}")
    return images


def _read_image(file: Path, size: int) -> np.ndarray:
    with Image.open(file, formats=_FORMATS) as image:
        image = ImageOps.exif_transpose(image)  # reads it whole, so a truncated file raises
    return np.asarray(_square(_rgb(image), size))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, at ``size`` pixels; an image of that size is left as it is."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1:3] == (size, size):
        return images
    return np.stack([np.asarray(_square(Image.fromarray(image), size)) for image in images])
