"""`classroomkd data`: inspect a data set, pack it into a ``.beton`` file, verify such a file."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classroomkd.cli.arguments import (
    DATA_HELP,
    DEFAULT_IMAGE_SIZE,
    PHOTO_SIDE,
    QUALITY,
    Parser,
    add_command,
    add_download,
    add_loading,
    not_empty,
    path_option,
)
from classroomkd.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from classroomkd.data import ImageFiles, ImageSet, Parts

_PARTS = {
    "train": "training part",
    "validation": "validation part",
    "test": "held-out part",
}
_DEFAULT = "(default: %(default)s)"


def add_to(commands: Any) -> None:
    what = "show a data set, pack it into a .beton file, verify such a file"
    group = commands.add_parser("data", help=what, description=what)
    commands = group.add_subparsers(metavar="command", required=True)
    parser = add_command(
        commands, info, "show classes, image counts, sizes and statistics of a data set"
    )
    parser.add_argument(
        "source", type=not_empty, metavar="SOURCE", help=f"{DATA_HELP}, or a .beton file"
    )
    add_loading(parser)
    add_download(parser, "the folder SOURCE")
    parser.add_argument(
        "--contact-sheet",
        type=path_option,
        metavar="OUT.png",
        help="write a contact sheet of the first classes to this file",
    )

    parser = add_command(
        commands, pack, "pack a part of a data set into a .beton file, FFCV's format"
    )
    parser.add_argument("source", type=not_empty, metavar="SOURCE", help=DATA_HELP)
    parser.add_argument("out", type=path_option, metavar="OUT.beton")
    _add_packing(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")

    parser = add_command(
        commands, verify, "check a .beton file against its checksum and its source"
    )
    parser.add_argument("file", type=path_option, metavar="FILE.beton")
    parser.add_argument(
        "source",
        type=not_empty,
        nargs="?",
        metavar="SOURCE",
        help="the data set it was packed from, to compare pixel by pixel, with pack's options",
    )
    _add_packing(parser)


def _add_packing(parser: Parser) -> None:
    parser.add_argument(
        "--part",
        choices=(*_PARTS, "all"),
        default="train",
        help=f"part to pack {_DEFAULT}",
    )
    add_loading(parser)
    parser.add_argument("--photos", action="store_true", help="keep the shapes of images, as JPEGs")
    parser.add_argument(
        "--max-side",
        type=PHOTO_SIDE,
        metavar="PIXELS",
        help="shrink photos with a longer side to this length (default: 500)",
    )
    parser.add_argument(
        "--quality",
        type=QUALITY,
        metavar="N",
        help="JPEG quality of photos, 1 to 100 (default: 90)",
    )
    parser.add_argument("--raw", action="store_true", help="store photos as pixels, not as JPEGs")


def info(arguments: argparse.Namespace) -> None:
    """Print classes, counts, sizes and statistics; draw a contact sheet if asked for."""
    from classroomkd.data import NAMED_SOURCES, cifar
    from classroomkd.data.ffcv.beton import check_free
    from classroomkd.data.overview import LISTED, contact_sheet, load_beton
    from classroomkd.files import atomic_write

    sheet: Path | None = arguments.contact_sheet
    if sheet is not None:
        check_free(sheet, overwrite=False, remedy="give another name")
    path = Path(arguments.source).expanduser()
    if arguments.download:
        cifar.download(path, arguments.download)
    if arguments.source not in NAMED_SOURCES and path.is_file():
        folders: Mapping[str, str] = {}
        image_set, sizes = load_beton(path, arguments.image_size, DEFAULT_IMAGE_SIZE)
        parts = {"images in it": image_set}
    else:
        found, sizes = _load_with_sizes(path, arguments)
        folders = found.folders
        parts = {_PARTS[name]: part for name, part in found.sets().items()}
    first = next(iter(parts.values()))
    print(f"{arguments.source}: {len(first.classes)} classes")
    _print_sizes(sizes, first)
    counts = _print_counts(parts, {_PARTS[part]: folder for part, folder in folders.items()})

    from classroomkd.data import channel_statistics  # which takes torch

    mean, std = channel_statistics(first)
    of = "the images in it" if len(parts) == 1 else "the training part"
    print(f"{'mean':<15}{_three(mean)}  (red, green, blue of {of}, scaled to 0..1)")
    print(f"{'deviation':<15}{_three(std)}")
    for k, name in list(enumerate(first.classes))[:LISTED]:
        print(f"{' + '.join(f'{of_class[k]:,}' for of_class in counts):>15}  {name}")
    if len(first.classes) > LISTED:
        print(f"{'':>15}  … and {len(first.classes) - LISTED} classes more")
    if sheet is not None:
        data = io.BytesIO()
        contact_sheet(first).save(data, "PNG")
        atomic_write(sheet, data.getvalue())
        print(f"contact sheet: {sheet}")


def _print_sizes(sizes: np.ndarray, image_set: ImageSet) -> None:
    """Print the ``sizes`` [N, 2] of the stored images, and what they become in ``image_set``."""
    height, width = image_set.images.shape[1:3]
    used = f"{height}×{width} pixels"
    (low, high), (left, right) = ((side.min(), side.max()) for side in sizes.T)
    if (low, left) == (high, right):
        stored = f"{low}×{left} pixels"
    else:
        stored = f"{low} to {high} pixels high, {left} to {right} wide"
    print(f"{'images':<15}{stored}{'' if stored == used else f'; brought to {used} here'}")


def _print_counts(parts: Mapping[str, ImageSet], folders: Mapping[str, str]) -> list[np.ndarray]:
    """Print the images of each part, and return them by class; ``folders`` are those of parts."""
    import numpy as np

    counts = []
    for name, part in parts.items():
        of_class = np.bincount(part.targets, minlength=len(part.classes))
        low, high = of_class.min(), of_class.max()
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        origin = f", from {folders[name]}" if name in folders else ""
        print(f"{name:<15} {of_class.sum():>8,} images, {each} of each class{origin}")
        counts.append(of_class)
    return counts


def pack(arguments: argparse.Namespace) -> None:
    """Pack a part of a data set into a ``.beton`` file."""
    from classroomkd.data.ffcv import beton as betons
    from classroomkd.data.ffcv.bindings import import_ffcv

    out = arguments.out.expanduser()
    options = _photo_options(arguments)
    # Before the data, which may take long to read.
    betons.check_free(out, arguments.overwrite, "give another name, or --overwrite to replace it")
    import_ffcv()
    jpeg = arguments.photos and not arguments.raw
    beton = betons.pack(_part(arguments), out, overwrite=arguments.overwrite, jpeg=jpeg, **options)
    part = "all parts" if arguments.part == "all" else f"the {_PARTS[arguments.part]}"
    print(
        f"{out}: {len(beton):,} images of {len(beton.classes)} classes, "
        f"{part}, {out.stat().st_size / 1e6:,.1f} MB"
    )


def verify(arguments: argparse.Namespace) -> None:
    """Compare a ``.beton`` file with its side file, and with the data set if that is given."""
    from classroomkd.data.ffcv import beton as betons

    options = _photo_options(arguments)
    betons.open_beton(arguments.file)  # likewise before the data
    source = None if arguments.source is None else _part(arguments)
    beton = betons.verify(arguments.file, source, **options)
    equal = [] if source is None else [f"as in {arguments.source}"]
    equal += [] if beton.sha256 is None else [f"as packed (SHA-256 {beton.sha256[:12]}…)"]
    print(f"{arguments.file}: {len(beton):,} images {' and '.join(equal)}")


def _photo_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of packing and verifying photographs; UserError for incompatible options.

    Without ``--photos`` all images have been resized to one size already.
    """
    from classroomkd.data.ffcv.beton import MAX_SIDE
    from classroomkd.data.ffcv.beton import QUALITY as JPEG_QUALITY

    given = {name: getattr(arguments, name) for name in ("max_side", "quality", "raw")}
    if not arguments.photos:
        for name in (name for name, value in given.items() if value):
            raise UserError(f"--{name.replace('_', '-')} is for --photos, which is not given")
        return {"max_side": None, "quality": JPEG_QUALITY}
    if arguments.image_size:
        raise UserError("photographs keep their shapes: give --max-side instead of --image-size")
    if arguments.raw and arguments.quality:
        raise UserError("--quality is for JPEGs: give either it or --raw")
    return {"max_side": given["max_side"] or MAX_SIDE, "quality": given["quality"] or JPEG_QUALITY}


def _part(arguments: argparse.Namespace) -> ImageSet | ImageFiles:
    from classroomkd.data import join

    parts = (_list(arguments) if arguments.photos else _load(arguments)).sets()
    if arguments.part == "all":
        return join(*parts.values())
    if arguments.part not in parts:
        raise UserError(f"{arguments.source} has no val/ beside a test/: there is no such --part")
    return parts[arguments.part]


def _list(arguments: argparse.Namespace) -> Parts[ImageFiles]:
    from classroomkd.data import NAMED_SOURCES, list_parts

    if arguments.source in NAMED_SOURCES:
        raise UserError(f"the {arguments.source} are no photographs: leave out --photos")
    return list_parts(arguments.source, arguments.seed, arguments.test_share)


def _load(arguments: argparse.Namespace) -> Parts[ImageSet]:
    """All parts of a data set, in memory."""
    from classroomkd.data import NAMED_SOURCES, ImageSet, Parts, load_parts
    from classroomkd.data.decoding import resize

    size, split = arguments.image_size, (arguments.seed, arguments.test_share)
    if arguments.source not in NAMED_SOURCES:
        return load_parts(
            arguments.source,
            image_size=size or DEFAULT_IMAGE_SIZE,
            seed=split[0],
            test_share=split[1],
        )
    parts = NAMED_SOURCES[arguments.source].read(*split)
    if size is None:
        return Parts(*parts)
    train, test = (
        ImageSet(resize(part.images, size), part.targets, part.classes) for part in parts
    )
    return Parts(train, test)


def _load_with_sizes(
    path: Path, arguments: argparse.Namespace
) -> tuple[Parts[ImageSet], np.ndarray]:
    """All parts in memory, and height and width of the original images, [N, 2]."""
    import numpy as np

    from classroomkd.data import NAMED_SOURCES, cifar, decode, join
    from classroomkd.data.overview import sizes_of

    if arguments.source in NAMED_SOURCES:
        train, _ = NAMED_SOURCES[arguments.source].read(arguments.seed, arguments.test_share)
        return _load(arguments), np.array([train.images.shape[1:3]])
    if path.is_dir() and cifar.find(path):
        return _load(arguments), np.array([[cifar.SIDE, cifar.SIDE]])
    listed = _list(arguments)  # once: it prints the files that it skips
    parts = decode(listed, arguments.image_size or DEFAULT_IMAGE_SIZE)
    return parts, sizes_of(join(*listed.sets().values()))


def _three(values: tuple[float, float, float]) -> str:
    return "  ".join(f"{value:.4f}" for value in values)
