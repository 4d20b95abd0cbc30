"""Images with their classes: decoded in memory, or files decoded on access."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index as as_index
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from classroomkd.data.cache import files_digest
from classroomkd.data.decoding import read_image, rgb
from classroomkd.errors import UserError, one_line


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images: uint8 [N, H, W, 3] RGB, int64 [N] class indices, and the class names.

    Made from NumPy arrays: ``ImageSet(images, targets, ["cat", "dog"])``. ``set[i]`` is the image,
    uint8 [H, W, 3], and the class index of sample i.

    Raises UserError if the images are not uint8 [N, H, W, 3], or the targets are not N indices of
    the classes.
    """

    images: np.ndarray
    targets: np.ndarray
    classes: list[str]

    def __post_init__(self) -> None:
        images = self.images
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            what = getattr(images, "dtype", type(images).__name__)
            raise UserError(f"the images must be a uint8 NumPy array, got {what}")
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
            raise UserError(f"the images must be [N, H, W, 3], got {list(images.shape)}")
        _check_classes(self, len(images))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.targets[index])

    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of targets and images, as for a ``.beton`` file."""
        count, *sides, _ = self.images.shape
        modes = np.ones(count, np.uint8)  # raw
        heights, widths = (np.full(count, side) for side in sides)
        images = [np.ascontiguousarray(self.images)]
        return samples_digest(self.targets, modes, heights, widths, images)


def samples_digest(
    targets: np.ndarray,
    modes: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    images: Iterable[np.ndarray],
) -> str:
    """The SHA-256, in hexadecimal, in the side file of a ``.beton`` file of these samples."""
    digest = hashlib.sha256(targets.astype("<i8").tobytes())
    for column, dtype in ((modes, "u1"), (heights, "<u2"), (widths, "<u2")):
        digest.update(column.astype(dtype).tobytes())
    for image in images:
        digest.update(image.data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files, int64 [N] class indices, and the class names; an image is decoded on access.

    ``files[i]`` is the image of sample i in its own size, uint8 [H, W, 3], and its class index. It
    raises UserError, naming the file, if it cannot be decoded.

    Raises UserError if the targets are not N indices of the classes.
    """

    files: list[Path]
    targets: np.ndarray
    classes: list[str]

    def __post_init__(self) -> None:
        _check_classes(self, len(self.files))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return read_image(self.files[index]), int(self.targets[index])

    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of targets and files; no image is decoded.

        Raises OSError, naming the file, if one cannot be read.
        """
        content = self.targets.astype("<i8").tobytes() + files_digest(self.files).encode()
        return hashlib.sha256(content).hexdigest()


def _check_classes(image_set: ImageSet | ImageFiles, count: int) -> None:
    """Raise UserError unless there are ``count`` targets within the classes; make them int64."""
    targets, classes = np.asarray(image_set.targets), list(image_set.classes)
    for name in classes:
        if not isinstance(name, str):
            raise UserError(f"the classes must be names, got {name!r}")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"the class {twice!r} occurs more than once")
    if targets.dtype.kind not in "iu" and len(targets):
        raise UserError(f"the targets must be whole numbers, got {targets.dtype}")
    if targets.shape != (count,):
        raise UserError(f"the targets must be [{count}], one per image, got {list(targets.shape)}")
    outside = np.flatnonzero((targets < 0) | (targets >= len(classes)))
    if len(outside):
        i = outside[0]
        raise UserError(f"target {i} is {targets[i]}, but there are {len(classes)} classes")
    object.__setattr__(image_set, "targets", targets.astype(np.int64, copy=False))
    object.__setattr__(image_set, "classes", classes)


AnySet = TypeVar("AnySet", bound=ImageSet | ImageFiles)


def join(*parts: AnySet) -> AnySet:
    """The images of all parts of a data set, in order."""
    targets = np.concatenate([part.targets for part in parts])
    if isinstance(parts[0], ImageFiles):
        files = [file for part in parts for file in cast(ImageFiles, part).files]
        return replace(parts[0], files=files, targets=targets)
    images = np.concatenate([cast(ImageSet, part).images for part in parts])
    return replace(parts[0], images=images, targets=targets)


def select(image_set: AnySet, mask: np.ndarray) -> AnySet:
    """The samples where ``mask``, bool [N], is True, in order."""
    targets = image_set.targets[mask]
    if isinstance(image_set, ImageFiles):
        files = [image_set.files[i] for i in np.flatnonzero(mask)]
        return replace(image_set, files=files, targets=targets)
    return replace(image_set, images=image_set.images[mask], targets=targets)


def from_dataset(dataset: Any, classes: Sequence[str] | None = None) -> ImageSet:
    """Load a map-style data set of (image, class index) pairs, such as torchvision's, into memory.

    The images, all of one size, are PIL images, or uint8 arrays or CPU tensors [H, W, 3] or
    [3, H, W] (if a shape fits both, arrays are read as the former and tensors as the latter). The
    class names are ``classes``, or the data set's own ``classes``, or "0", "1", ….

    Raises UserError, naming the index, if a sample cannot be read or is not such a pair.
    """
    if not len(dataset):
        raise UserError("the data set is empty")
    images, targets = None, np.empty(len(dataset), np.int64)
    for i in range(len(dataset)):
        try:
            image, target = as_sample(dataset[i])
        except Exception as error:  # the data set's own code may raise anything
            raise UserError(
                f"sample {i} of the data set cannot be used: {one_line(error)}"
            ) from error
        if images is None:
            images = np.empty((len(dataset), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"image {i} of the data set is {list(image.shape)}, but image 0 is "
                f"{list(images.shape[1:])}: resize them to one size first"
            )
        images[i], targets[i] = image, target
    assert images is not None  # there is at least one
    if classes is None:
        classes = getattr(dataset, "classes", None) or [str(k) for k in range(targets.max() + 1)]
    return ImageSet(images, targets, list(classes))


def as_sample(sample: Any) -> tuple[np.ndarray, int]:
    """A sample of a map-style data set as an image, uint8 [H, W, 3], and its class index.

    Raises ValueError or TypeError, without naming the sample, if it is not such a pair.
    """
    if not isinstance(sample, list | tuple) or len(sample) != 2:
        raise ValueError("it is not a pair (image, class index)")
    return as_pixels(sample[0]), as_index(sample[1])


def as_pixels(image: Any) -> np.ndarray:
    """An image of any type that `from_dataset` accepts, as uint8 [H, W, 3]."""
    pillow = sys.modules.get("PIL.Image")  # imported already if the image is one of Pillow's
    if pillow is not None and isinstance(image, pillow.Image):
        return np.asarray(rgb(image))
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(f"its image is {array.dtype}, not uint8 (remove transforms like ToTensor)")
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        raise ValueError(f"its image is {list(array.shape)}, neither [H, W, 3] nor [3, H, W]")
    channels_first = array.shape[0] == 3 and (
        array.shape[2] != 3 or not isinstance(image, np.ndarray)
    )
    return array.transpose(1, 2, 0) if channels_first else array
