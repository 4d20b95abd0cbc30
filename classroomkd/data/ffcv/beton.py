"""Pack images into ``.beton`` files, and compare such files with their source.

`classroomkd.data.ffcv.beton_file` describes these files and their side files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from classroomkd.data.decoding import bombs_refused, progress_bar
from classroomkd.data.ffcv.beton_file import (
    JPEG,
    RAW,
    Beton,
    decode_jpeg,
    open_alone,
    open_beton,
    read_record,
    side_file,
)
from classroomkd.data.ffcv.bindings import import_ffcv
from classroomkd.data.image_sets import ImageFiles, ImageSet
from classroomkd.errors import UserError
from classroomkd.files import atomic_file, atomic_write, sync

__all__ = ["JPEG", "RAW", "Beton", "check_free", "open_beton", "pack", "side_file", "verify"]

QUALITY, MAX_SIDE = 90, 500  # JPEG quality and longer side in pixels, of photographs
JPEG_ERROR = 8.0  # mean difference allowed between two encoders, in levels of 0..255

_SMALLEST_PAGE, _LARGEST_PAGE = 1 << 21, 1 << 27  # bytes; the first is FFCV's limit
_LONGEST_SIDE = 65535  # the format has 16 bits for it
_PROBED = 32  # images encoded to estimate the size of the file


def pack(
    images: ImageSet | ImageFiles,
    path: Path | str,
    *,
    overwrite: bool = False,
    jpeg: bool = False,
    quality: int = QUALITY,
    max_side: int | None = None,
) -> Beton:
    """Write ``images`` to the ``.beton`` file ``path`` and its side file, and open it.

    Images whose longer side is above ``max_side`` pixels are shrunk to it. They are stored as
    pixels, or with ``jpeg`` as JPEGs of ``quality`` 1..100. The same images give the same bytes
    (for JPEGs, with the same OpenCV release). After an error or an interruption, ``path`` is either
    unchanged or complete.

    Raises UserError if ``path`` exists and ``overwrite`` is not set, if there is no image or not
    enough space, or, naming the image, if one cannot be read or stored; OSError, naming ``path``,
    if the file cannot be written.
    """
    path = Path(path).expanduser()
    check_free(path, overwrite)
    if not len(images):
        raise UserError(f"there are no images to pack into {path}")
    import_ffcv()
    from ffcv.fields import IntField, RGBImageField

    from classroomkd.data.ffcv.beton_writer import InProcessWriter

    field = RGBImageField(write_mode="jpg" if jpeg else "raw", jpeg_quality=quality)
    page_size = _page_size(images, max_side)
    _check_space(images, path, field, page_size, max_side)
    try:
        with atomic_file(path) as temporary:
            with (
                progress_bar(f"Packing {len(images):,} images", len(images)) as advance,
                closing(_read_ahead(images, max_side, page_size)) as samples,
            ):
                fields = {"image": field, "label": IntField()}
                writer = InProcessWriter(str(temporary), fields, page_size, advance)
                writer.from_indexed_dataset(_InOrder(samples, len(images)), chunksize=64)
            beton = open_alone(temporary, images.classes)
            record = {
                "classes": images.classes,
                "images": len(images),
                "bytes": temporary.stat().st_size,
                "sha256": beton.digest(),
            }
            sync(temporary)
            following = {"inode": temporary.stat().st_ino, "record": record}
            _write_side(path, _record_of(path) | {"next": following})
        _write_side(path, record)
    except OSError as error:
        error.filename = str(path)
        raise
    return open_beton(path)


def _record_of(path: Path) -> dict[str, Any]:
    """The record of the file at ``path``, or an empty one."""
    try:
        return read_record(path, path.stat().st_ino) or {}
    except (FileNotFoundError, UserError):
        return {}


def _write_side(path: Path, content: dict[str, Any]) -> None:
    atomic_write(side_file(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check_free(
    path: Path, overwrite: bool, remedy: str = "give another name, or overwrite=True to replace it"
) -> None:
    """Raise UserError unless ``path`` can be created, or with ``overwrite`` replaced.

    ``remedy`` is the advice in the message if the file exists.
    """
    if path.is_dir() or not path.name:
        raise UserError(f"{path} is a folder: give the name of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"no such folder: {path.parent}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: {remedy}")


def verify(
    path: Path | str,
    source: ImageSet | ImageFiles | None = None,
    *,
    quality: int = QUALITY,
    max_side: int | None = None,
) -> Beton:
    """Compare a ``.beton`` file with the images it was packed from, and with its side file.

    Raw images must equal the source (shrunk to ``max_side`` as in packing) in every pixel. JPEGs
    must have the bytes of the source compressed at ``quality``, or its size and a mean difference
    of at most `JPEG_ERROR` levels, because OpenCV releases compress slightly differently. Without
    ``source`` only the SHA-256 is compared.

    Raises UserError, naming the first index that differs, or if there is nothing to compare with.
    """
    beton = open_beton(path)
    if source is None and beton.sha256 is None:
        raise UserError(
            f"{beton.path} has no {side_file(beton.path).name} next to it to compare with: give "
            "the data set that it was packed from"
        )
    if source is not None:
        _compare(beton, source, quality, max_side)
    if beton.sha256 is not None and beton.digest() != beton.sha256:
        raise UserError(
            f"the targets or pixels of {beton.path} do not match the SHA-256 in "
            f"{side_file(beton.path).name}: pack it again"
        )
    return beton


def _compare(
    beton: Beton, source: ImageSet | ImageFiles, quality: int, max_side: int | None
) -> None:
    from ffcv.fields.rgb_image import encode_jpeg

    if len(beton) != len(source):
        raise UserError(f"{beton.path} has {len(beton):,} images, the data set {len(source):,}")
    if beton.sha256 is not None and beton.classes != source.classes:
        raise UserError(f"{beton.path} has other classes than the data set")
    for i in np.flatnonzero(beton.targets != source.targets)[:1]:
        raise UserError(
            f"{beton.path}: the target of image {i} is {beton.targets[i]}, in the data set "
            f"{source.targets[i]}"
        )
    with (
        progress_bar(f"Comparing {len(beton):,} images", len(beton)) as advance,
        closing(_read_ahead(source, max_side)) as samples,
    ):
        for i, (wanted, _) in enumerate(samples):
            advance(1)
            shape = (int(beton.heights[i]), int(beton.widths[i]), 3)
            if shape != wanted.shape:
                raise UserError(
                    f"{beton.path}: image {i} is {list(shape)}, {_name(source, i)} in the data set "
                    f"{list(wanted.shape)}"
                )
            if beton.modes[i] == JPEG:
                wanted = encode_jpeg(wanted, quality)
                if np.array_equal(beton.stored(i), wanted):
                    continue
                wanted = decode_jpeg(wanted)
            found, _ = beton[i]
            if np.array_equal(found, wanted):
                continue
            difference = np.abs(found.astype(np.int16) - wanted)
            what = f"{beton.path}: image {i} differs from {_name(source, i)} in the data set"
            if beton.modes[i] == RAW:
                row, column = np.argwhere(difference.any(2))[0]
                raise UserError(f"{what}, first at row {row}, column {column}")
            if difference.mean() > JPEG_ERROR:
                raise UserError(
                    f"{what} by {difference.mean():.1f} levels on average, more than {JPEG_ERROR:g}"
                )


def _name(images: ImageSet | ImageFiles, index: int) -> str:
    return str(images.files[index]) if isinstance(images, ImageFiles) else f"image {index}"


class _InOrder:
    """Wraps an iterator for FFCV's writer, which reads samples 0, 1, 2, … by index."""

    def __init__(self, samples: Iterator, count: int) -> None:
        self._samples, self._count = samples, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, _: int) -> tuple[np.ndarray, int]:
        return next(self._samples)


def _read_ahead(
    images: ImageSet | ImageFiles, max_side: int | None, most: int = _LARGEST_PAGE
) -> Generator[tuple[np.ndarray, int], None, None]:
    """All samples in order, ready to be stored; threads decode files ahead."""
    if isinstance(images, ImageSet):
        for i in range(len(images)):
            yield _to_store(images, i, max_side, most)
        return
    workers = min(os.cpu_count() or 1, 8)
    with bombs_refused(), ThreadPoolExecutor(workers) as pool:
        ahead: deque = deque()
        try:
            for i in range(len(images)):
                ahead.append(pool.submit(_to_store, images, i, max_side, most))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _to_store(
    images: ImageSet | ImageFiles, index: int, max_side: int | None, most: int
) -> tuple[np.ndarray, int]:
    """A sample, shrunk by FFCV's own function; UserError if the format cannot store it."""
    from ffcv.fields.rgb_image import resizer

    image, target = images[index]
    height, width = image.shape[:2]
    longer, shorter = max(height, width), min(height, width)
    if max_side is not None and shorter * max_side < longer:
        raise UserError(
            f"{_name(images, index)} is {height}×{width} pixels: shrunk to {max_side}, its shorter "
            "side vanishes; remove it"
        )
    image = resizer(image, max_side)
    if max(image.shape) > _LONGEST_SIDE or image.nbytes > most:
        raise UserError(
            f"{_name(images, index)} is {height}×{width} pixels, which is too large to pack: give "
            "a --max-side, or a smaller one"
        )
    return image, target


def _page_size(images: ImageSet | ImageFiles, max_side: int | None) -> int:
    """The size in bytes, a power of two, of the file's pages; no image crosses a page.

    A page holds eight of the largest images, if their size is known, so little space is wasted.
    """
    if isinstance(images, ImageSet):
        largest = images.images[0].nbytes
    else:
        largest = 3 * max_side**2 if max_side is not None else _SMALLEST_PAGE
    return min(max(1 << (8 * largest - 1).bit_length(), _SMALLEST_PAGE), _LARGEST_PAGE)


def _check_space(
    images: ImageSet | ImageFiles, path: Path, field: Any, page_size: int, max_side: int | None
) -> None:
    """Raise UserError if the file would not fit, as estimated from a few evenly spaced images."""
    sizes = []

    def measure(size: int) -> tuple[int, np.ndarray]:
        sizes.append(size)
        return 0, np.empty(size, np.uint8)

    for i in np.unique(np.linspace(0, len(images) - 1, _PROBED).astype(int)):
        image, _ = _to_store(images, i, max_side, page_size)
        field.encode(np.zeros(1, field.metadata_type), image, measure)
    per_page = page_size // math.ceil(sum(sizes) / len(sizes))
    pages = 1 + math.ceil(len(images) / per_page)  # the first is for the tables
    needed, free = pages * page_size + 48 * len(images), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path} will need about {needed / 1e6:,.0f} MB, but {path.parent} has "
            f"{free / 1e6:,.0f} MB free: free some space, or pack elsewhere"
        )
