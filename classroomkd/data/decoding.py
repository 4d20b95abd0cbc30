"""Decode image files into uint8 RGB arrays: upright, opaque and optionally square."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from classroomkd.errors import UserError, one_line

if TYPE_CHECKING:  # Pillow is imported on use, because decoded images do not need it
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_FORMATS = ("PNG", "JPEG", "WEBP")
_CHUNK = 64  # images per task of a thread


def read_files(files: list[Path], size: int) -> np.ndarray:
    """Decode all files into uint8 [N, size, size, 3]; the UserError names the first failure."""
    images = np.empty((len(files), size, size, 3), np.uint8)

    def read(start: int) -> list[str]:
        failed = []
        for i in range(start, min(start + _CHUNK, len(files))):
            try:
                images[i] = read_image(files[i], size)
            except UserError as error:
                failed.append(str(error))
        return failed

    failures = []
    starts, takes_long = range(0, len(files), _CHUNK), len(files) >= 1000
    with (
        progress_bar(f"Reading {len(files):,} images", len(starts), takes_long) as advance,
        bombs_refused(),
        ThreadPoolExecutor() as pool,
    ):
        for failed in pool.map(read, starts):
            failures += failed
            advance(1)
    if failures:
        others = len(failures) - 1
        more = f"; {others} more cannot be read either" if others else ""
        raise UserError(f"{failures[0]}{more}: replace or remove {'them' if others else 'it'}")
    return images


@contextmanager
def progress_bar(
    description: str, total: int, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal; yields the function that advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def bombs_refused() -> Iterator[None]:
    """Turn Pillow's warning about decompression bombs into an error.

    Warning filters are global to the process, so this must enclose the decoding threads.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_image(file: Path, size: int | None = None) -> np.ndarray:
    """Decode ``file`` into uint8 [size, size, 3], or [H, W, 3] of its own size.

    Raises UserError, naming the file, if it cannot be decoded completely.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=_FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)  # reads all of it, so a truncated file raises
        image = rgb(image)
        return np.asarray(image if size is None else _square(image, size))
    except UnidentifiedImageError:
        raise UserError(f"{file} is not a PNG, JPEG or WebP image") from None
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise UserError(f"{file} cannot be read ({one_line(error)})") from error


def read_size(file: Path) -> tuple[int, int]:
    """Height and width of the image in ``file``, which must be decodable."""
    from PIL import ExifTags, Image

    with Image.open(file, formats=_FORMATS) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by 90°
    return (width, height) if turned else (height, width)


def rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: transparent pixels over white, 16-bit grey scaled to 8 bits."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, H, W, 3] as [N, size, size, 3], resized as image files are."""
    if images.shape[1:3] == (size, size):
        return images
    return np.stack([square(image, size) for image in images])


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square of uint8 [H, W, 3], resampled to [size, size, 3]."""
    from PIL import Image

    return np.asarray(_square(Image.fromarray(image), size))


def _square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, resized to ``size`` pixels; unchanged if it has that size."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
