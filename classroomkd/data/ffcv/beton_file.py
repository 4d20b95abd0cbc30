"""Open ``.beton`` files, the format of FFCV, and check all of their tables.

A file has the fields ``image`` (RGB, raw or JPEG) and ``label`` (integer), as FFCV itself writes
them, so any FFCV program can read it. A side file, ``NAME.beton.json``, adds the class names and a
SHA-256 of the samples in the order of their indices: all targets (int64), modes (uint8, 0 JPEG and
1 raw), heights and widths (uint16), then each image's stored bytes, all little-endian. It depends
only on the samples.

Two files cannot be replaced atomically. So before a ``.beton`` file is replaced, the new record is
added to its side file as ``next``, with the new file's inode to tell which record applies.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from classroomkd.data.decoding import progress_bar
from classroomkd.data.ffcv.bindings import import_ffcv
from classroomkd.data.image_sets import samples_digest
from classroomkd.errors import UserError, one_line

JPEG, RAW = 0, 1  # FFCV's storage modes

_Read = TypeVar("_Read")

_FIELDS = [("image", 2), ("label", 1)]  # names and FFCV's type ids
_MOST_CLASSES = 1 << 20  # without a side file; a damaged target is likely above it


@dataclass(frozen=True, eq=False)
class Beton:
    """An open ``.beton`` file of N images with checked offsets.

    Attributes:
        path: of the file.
        classes: their names; "0", "1", … if there is no side file.
        targets: class indices, int64 [N].
        heights: in pixels, int64 [N].
        widths: in pixels, int64 [N].
        modes: `JPEG` or `RAW`, uint8 [N].
        starts: the offset of each image in the file, int64 [N].
        sizes: the bytes of each image, int64 [N]; 3 · height · width for raw ones.
        sha256: of the samples, from the side file; None without one.
        data: the whole file, uint8, memory-mapped for reading.
    """

    path: Path
    classes: list[str]
    targets: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    modes: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    sha256: str | None
    data: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def stored(self, index: int) -> np.ndarray:
        """The stored bytes of an image, a uint8 view of the file."""
        return self.data[self.starts[index] : self.starts[index] + self.sizes[index]]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The image, uint8 [H, W, 3], and the class index of a sample.

        Raises UserError if a JPEG cannot be decoded or its size differs from its entry.
        """
        shape = (int(self.heights[index]), int(self.widths[index]), 3)
        if self.modes[index] == RAW:
            image = self.stored(index).reshape(shape).copy()
        else:
            image = self._read(index, decode_jpeg)
            self._require_shape(index, image.shape)
        return image, int(self.targets[index])

    def check_jpeg(self, index: int) -> None:
        """Raise UserError if the size in a JPEG's header differs from its entry."""
        self._require_shape(index, self._read(index, jpeg_shape))

    def _read(self, index: int, read: Callable[[np.ndarray], _Read]) -> _Read:
        try:
            return read(self.stored(index))
        except Exception as error:  # decoders raise almost anything on damaged bytes
            raise UserError(
                f"{self.path}: image {index} cannot be read ({one_line(error)})"
            ) from error

    def _require_shape(self, index: int, shape: tuple[int, int, int]) -> None:
        expected = (int(self.heights[index]), int(self.widths[index]), 3)
        if shape != expected:
            raise UserError(
                f"{self.path}: image {index} is {list(shape)}, its entry says {list(expected)}: "
                "the file is corrupt, pack it again"
            )

    def digest(self) -> str:
        """The SHA-256 of the samples (see the module), in hexadecimal."""

        def images() -> Iterator[np.ndarray]:
            with progress_bar(f"Hashing {len(self):,} images", len(self)) as advance:
                for i in range(len(self)):
                    yield self.stored(i)
                    advance(1)

        return samples_digest(self.targets, self.modes, self.heights, self.widths, images())


def side_file(path: Path) -> Path:
    """The path of the side file, with class names and SHA-256, of the ``.beton`` file ``path``."""
    return path.with_name(f"{path.name}.json")


def open_beton(path: Path | str) -> Beton:
    """Open a ``.beton`` file of images and labels, and check all of its tables.

    Raises UserError, naming the file and the index of a faulty image, if the file is missing,
    truncated, inconsistent, or of another format, or if the side file belongs to another file.
    """
    path = Path(path).expanduser()
    import_ffcv()
    if not path.is_file():
        raise UserError(
            f"{path} is a folder: give a .beton file" if path.is_dir() else f"no such file: {path}"
        )
    while True:
        with path.open("rb") as file:
            opened = os.fstat(file.fileno())
            record = read_record(path, opened.st_ino)
            if os.path.samestat(opened, path.stat()):
                return _open_recorded(path, file, record)
        # The file was replaced meanwhile, and the record may be that of the new file: try again.


def read_record(path: Path, inode: int) -> dict[str, Any] | None:
    """The record of the file ``path`` with that inode, from its side file, or None.

    Raises UserError if the side file is damaged.
    """
    side = side_file(path)
    try:
        record = json.loads(side.read_text(encoding="utf-8"))
        if "next" in record:
            following = record.pop("next")
            record = following["record"] if following["inode"] == inode else record
            if not record:
                return None
        classes = record["classes"]
        if not isinstance(classes, list) or {type(name) for name in classes} != {str}:
            raise TypeError("classes must be a list of names")
        images, size = int(record["images"]), int(record["bytes"])
        return record | {"images": images, "bytes": size, "sha256": str(record["sha256"])}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{side} is damaged ({type(error).__name__}: {error}): remove it, or pack again"
        ) from error


def _open_recorded(path: Path, file: BinaryIO, record: dict[str, Any] | None) -> Beton:
    if record is None:
        return _open(path, file, None, None)
    size, name = os.fstat(file.fileno()).st_size, side_file(path).name
    if record["bytes"] != size:
        raise UserError(
            f"{path} has {size:,} bytes, but {name} says {record['bytes']:,}: it was truncated or "
            "is another file; pack it again"
        )
    beton = _open(path, file, record["classes"], record["sha256"])
    if record["images"] != len(beton):
        raise UserError(f"{path} has {len(beton):,} images, but {name} says {record['images']:,}")
    return beton


def open_alone(path: Path, classes: list[str]) -> Beton:
    """Open a file without reading its side file."""
    with path.open("rb") as file:
        return _open(path, file, classes, None)


def _open(path: Path, file: BinaryIO, classes: list[str] | None, sha256: str | None) -> Beton:
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        FieldDescType,
        HeaderType,
        get_handlers,
        get_metadata_type,
    )

    size = os.fstat(file.fileno()).st_size
    if size < HeaderType.itemsize:
        raise UserError(f"{path} is not a .beton file: it has only {size} bytes")
    data = np.asarray(np.memmap(file, np.uint8, mode="r"))

    def table(dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """``count`` entries from the byte ``start`` on, or fewer at the end of the file."""
        part = data[start : start + count * dtype.itemsize]
        return part[: len(part) // dtype.itemsize * dtype.itemsize].view(dtype)

    header = table(HeaderType, 0, 1)[0]
    count, end, page_size = (
        int(header[name]) for name in ("num_samples", "alloc_table_ptr", "page_size")
    )
    if header["version"] != CURRENT_VERSION:
        raise UserError(f"{path} is not a .beton file of FFCV's format {CURRENT_VERSION}")
    if end == 0:
        raise UserError(f"{path} was never finished: pack it again")
    described = table(FieldDescType, HeaderType.itemsize, int(header["num_fields"]))
    fields = [
        (field["name"].tobytes().split(b"\0")[0].decode("ascii", "replace"), field["type_id"])
        for field in described
    ]
    if fields != _FIELDS:
        names = ", ".join(name for name, _ in fields) or "none"
        raise UserError(
            f"{path} has the fields {names}, instead of image (RGB images) and label (integers)"
        )
    expected = end + count * ALLOC_TABLE_TYPE.itemsize
    if size != expected:
        what = "was truncated" if size < expected else "is damaged"
        raise UserError(
            f"{path} {what}: it has {size:,} bytes instead of {expected:,}; pack it again"
        )
    tables = HeaderType.itemsize + described.nbytes
    begin = tables + 24 * count  # an entry of the sample table has 24 bytes
    if count == 0 or begin > end or page_size == 0 or end % page_size:
        raise _corrupt(path, "its header is inconsistent")
    samples = table(get_metadata_type(get_handlers(described)), tables, count)
    places = table(ALLOC_TABLE_TYPE, end, count)
    places = places[np.argsort(places["sample_id"], kind="stable")]
    if not np.array_equal(places["sample_id"], np.arange(count)):
        raise _corrupt(path, "its allocation table does not list each image once")
    return _checked(path, samples, places, (begin, end), classes, sha256, data)


def _checked(
    path: Path,
    samples: np.ndarray,
    places: np.ndarray,
    bounds: tuple[int, int],
    classes: list[str] | None,
    sha256: str | None,
    data: np.ndarray,
) -> Beton:
    """The file, after checking its table of ``samples`` and its allocation table ``places``.

    Images must lie within ``bounds``, the first byte and the end of the pages.
    """

    def check(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            raise _corrupt(path, f"image {np.flatnonzero(wrong)[0]} {what}")

    begin, end = bounds
    image, targets = (samples[name] for name in samples.dtype.names or ())
    starts, sizes = places["ptr"], places["size"]
    check(starts != image["data_ptr"], "has two positions")
    check((starts < begin) | (starts > end) | (sizes > end), "lies outside the file")
    starts, sizes = starts.astype(np.int64), sizes.astype(np.int64)
    check(starts + sizes > end, "lies outside the file")
    order = np.argsort(starts, kind="stable")
    overlap = np.zeros(len(samples), bool)
    overlap[order[1:]] = (starts + sizes)[order[:-1]] > starts[order[1:]]
    check(overlap, "overlaps another")
    heights, widths = (image[name].astype(np.int64) for name in ("height", "width"))
    modes = image["mode"].copy()
    check((heights == 0) | (widths == 0) | (sizes == 0), "has no pixels")
    check((modes != JPEG) & (modes != RAW), "has an unknown mode")
    check((modes == RAW) & (sizes != 3 * heights * widths), "has the wrong number of bytes")
    targets = targets.astype(np.int64)
    most = _MOST_CLASSES if classes is None else len(classes)
    check((targets < 0) | (targets >= most), f"has a target outside its {most:,} classes")
    if classes is None:
        classes = [str(k) for k in range(int(targets.max()) + 1)]
    return Beton(path, classes, targets, heights, widths, modes, starts, sizes, sha256, data)


def _corrupt(path: Path, what: str) -> UserError:
    return UserError(f"{path} is corrupt: {what}; pack it again")


def decode_jpeg(data: np.ndarray) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data.data), formats=("JPEG",)) as image:
        return np.array(image.convert("RGB"))


def jpeg_shape(data: np.ndarray) -> tuple[int, int, int]:
    """Height, width and 3, from the header alone."""
    from PIL import Image

    with Image.open(io.BytesIO(data.data), formats=("JPEG",)) as image:
        return image.height, image.width, 3
