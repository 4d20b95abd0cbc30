"""What the ``data`` commands do: look at a data set, pack it into a ``.beton`` file, check that."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from classroomkd.data import (
    NAMED_SOURCES,
    ImageFiles,
    ImageSet,
    Parts,
    cifar,
    decode,
    join,
    list_parts,
    load_parts,
)
from classroomkd.data import beton as betons
from classroomkd.data._ffcv import import_ffcv
from classroomkd.data.beton import MAX_SIDE, QUALITY, check_free, open_beton
from classroomkd.data.decode import read_size, resize, square
from classroomkd.errors import UserError
from classroomkd.files import atomic_write

_PARTS = {
    "train": "the training part",
    "validation": "the validation part",
    "test": "the held-out part",
    "all": "all parts",
}
_IMAGE_SIZE = 32
_LISTED = 20  # classes that are listed with their counts, and that a contact sheet shows
_COLUMNS = 10  # images of a class on a contact sheet
_TILE = 48  # pixels, at least, that an image takes on it


def info(arguments: argparse.Namespace) -> None:
    """Print classes, counts, sizes and statistics; draw a contact sheet if asked for."""
    sheet: Path | None = arguments.contact_sheet
    if sheet is not None:
        check_free(sheet, overwrite=False, remedy="give another name")
    path = Path(arguments.source).expanduser()
    if arguments.source not in NAMED_SOURCES and path.is_file():
        folders: Mapping[str, str] = {}
        image_set, sizes = _load_beton(path, arguments.image_size)
        parts = {"images in it": image_set}
    else:
        found, sizes = _load_with_sizes(path, arguments)
        folders = found.folders
        parts = {_PARTS[name].removeprefix("the "): part for name, part in found.sets().items()}
    first = next(iter(parts.values()))
    height, width = first.images.shape[1:3]
    print(f"{arguments.source}: {len(first.classes)} classes")
    used = f"{height}×{width} pixels"
    (low, high), (left, right) = ((side.min(), side.max()) for side in sizes.T)
    if (low, left) == (high, right):
        stored = f"{low}×{left} pixels"
    else:
        stored = f"{low} to {high} pixels high, {left} to {right} wide"
    print(f"{'images':<15}{stored}{'' if stored == used else f'; brought to {used} here'}")
    counts = {
        name: np.bincount(part.targets, minlength=len(part.classes)) for name, part in parts.items()
    }
    of_part = {_PARTS[part].removeprefix("the "): folder for part, folder in folders.items()}
    for name, of_class in counts.items():
        low, high = of_class.min(), of_class.max()
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        origin = f", from {of_part[name]}" if name in of_part else ""
        print(f"{name:<15} {of_class.sum():>8,} images, {each} of each class{origin}")
    from classroomkd.data import channel_statistics  # which takes torch

    mean, std = channel_statistics(first)
    of = "the images in it" if len(parts) == 1 else "the training part"
    print(f"{'mean':<15}{_three(mean)}  (red, green, blue of {of}, scaled to 0..1)")
    print(f"{'deviation':<15}{_three(std)}")
    for k, name in list(enumerate(first.classes))[:_LISTED]:
        print(f"{' + '.join(f'{of_class[k]:,}' for of_class in counts.values()):>15}  {name}")
    if len(first.classes) > _LISTED:
        print(f"{'':>15}  … and {len(first.classes) - _LISTED} classes more")
    if sheet is not None:
        data = io.BytesIO()
        _contact_sheet(first).save(data, "PNG")
        atomic_write(sheet, data.getvalue())
        print(f"contact sheet: {sheet}")


def pack(arguments: argparse.Namespace) -> None:
    """Pack a part of a data set into a ``.beton`` file."""
    out = arguments.out.expanduser()
    options = _photo_options(arguments)
    # Before the data, which may take long to read.
    check_free(out, arguments.overwrite, "give another name, or --overwrite to replace it")
    import_ffcv()
    jpeg = arguments.photos and not arguments.raw
    beton = betons.pack(_part(arguments), out, overwrite=arguments.overwrite, jpeg=jpeg, **options)
    print(
        f"{out}: {len(beton):,} images of {len(beton.classes)} classes, "
        f"{_PARTS[arguments.part]}, {out.stat().st_size / 1e6:,.1f} MB"
    )


def verify(arguments: argparse.Namespace) -> None:
    """Compare a ``.beton`` file with its side file, and with the data set if that is given."""
    options = _photo_options(arguments)
    open_beton(arguments.file)  # likewise before the data
    source = None if arguments.source is None else _part(arguments)
    beton = betons.verify(arguments.file, source, **options)
    equal = [] if source is None else [f"as in {arguments.source}"]
    equal += [] if beton.sha256 is None else [f"as packed (SHA-256 {beton.sha256[:12]}…)"]
    print(f"{arguments.file}: {len(beton):,} images {' and '.join(equal)}")


def _photo_options(arguments: argparse.Namespace) -> dict[str, int | None]:
    """What packing and verifying do to photographs; UserError for options that do not go together.

    Without ``--photos`` images have been brought to one size already.
    """
    given = {name: getattr(arguments, name) for name in ("max_side", "quality", "raw")}
    if not arguments.photos:
        for name in (name for name, value in given.items() if value):
            raise UserError(f"--{name.replace('_', '-')} is for --photos, which is not given")
        return {"max_side": None, "quality": QUALITY}
    if arguments.image_size:
        raise UserError("photographs keep their shapes: give --max-side instead of --image-size")
    if arguments.raw and arguments.quality:
        raise UserError("--quality is of JPEG: give it or --raw, not both")
    return {"max_side": given["max_side"] or MAX_SIDE, "quality": given["quality"] or QUALITY}


def _part(arguments: argparse.Namespace) -> ImageSet | ImageFiles:
    parts = (_list(arguments) if arguments.photos else _load(arguments)).sets()
    if arguments.part == "all":
        return join(*parts.values())
    if arguments.part not in parts:
        raise UserError(f"{arguments.source} has no val/ beside a test/: there is no such --part")
    return parts[arguments.part]


def _list(arguments: argparse.Namespace) -> Parts[ImageFiles]:
    if arguments.source in NAMED_SOURCES:
        raise UserError(f"the {arguments.source} are no photographs: leave out --photos")
    return list_parts(arguments.source, arguments.seed, arguments.test_share)


def _load(arguments: argparse.Namespace) -> Parts[ImageSet]:
    """All parts of a data set, in memory."""
    size, split = arguments.image_size, (arguments.seed, arguments.test_share)
    if arguments.source not in NAMED_SOURCES:
        return load_parts(
            arguments.source, image_size=size or _IMAGE_SIZE, seed=split[0], test_share=split[1]
        )
    parts = NAMED_SOURCES[arguments.source].read(*split)
    if size is None:
        return Parts(*parts)
    return Parts(
        *(ImageSet(resize(part.images, size), part.targets, part.classes) for part in parts)
    )


def _load_with_sizes(
    path: Path, arguments: argparse.Namespace
) -> tuple[Parts[ImageSet], np.ndarray]:
    """All parts in memory, and height and width of the original images, [N, 2]."""
    if arguments.source in NAMED_SOURCES:
        train, _ = NAMED_SOURCES[arguments.source].read(arguments.seed, arguments.test_share)
        return _load(arguments), np.array([train.images.shape[1:3]])
    if path.is_dir() and cifar.find(path):
        return _load(arguments), np.array([[cifar.SIDE, cifar.SIDE]])
    listed = _list(arguments)  # once: it says what it passes over
    parts = decode(listed, arguments.image_size or _IMAGE_SIZE)
    files = join(*listed.sets().values()).files
    with ThreadPoolExecutor() as pool:
        return parts, np.array(list(pool.map(read_size, files, chunksize=64)))


def _load_beton(path: Path, size: int | None) -> tuple[ImageSet, np.ndarray]:
    """A file's images in memory, where they differ in size as squares, and their sizes [N, 2]."""
    beton = open_beton(path)
    sizes = np.stack((beton.heights, beton.widths), axis=1)
    if size is None and (sizes != sizes[0]).any():
        size = _IMAGE_SIZE
    images = np.empty((len(beton), *(sizes[0] if size is None else (size, size)), 3), np.uint8)
    for i in range(len(beton)):
        images[i] = beton[i][0] if size is None else square(beton[i][0], size)
    return ImageSet(images, beton.targets, beton.classes), sizes


def _three(values: tuple[float, float, float]) -> str:
    return "  ".join(f"{value:.4f}" for value in values)


def _contact_sheet(image_set: ImageSet) -> Image.Image:
    """The first images of each of the first classes, one row per class, its name before them."""
    font, gap = ImageFont.load_default(), 2
    # Pillow's own font has no other letters, and minds.
    names = [
        name.encode("latin-1", "replace").decode("latin-1") for name in image_set.classes[:_LISTED]
    ]
    height, width = image_set.images.shape[1:3]
    scale = max(1, -(-_TILE // max(height, width)))
    row, column = height * scale + gap, width * scale + gap
    left = 2 * gap + max(int(font.getlength(name)) + 1 for name in names)
    sheet = Image.new("RGB", (left + _COLUMNS * column, gap + len(names) * row), "white")
    draw = ImageDraw.Draw(sheet)
    for k, name in enumerate(names):
        top = gap + k * row
        draw.text((gap, top + height * scale // 2 - 6), name, "black", font)
        for j, i in enumerate(np.flatnonzero(image_set.targets == k)[:_COLUMNS]):
            image = image_set.images[i].repeat(scale, 0).repeat(scale, 1)
            sheet.paste(Image.fromarray(image), (left + j * column, top))
    return sheet
