"""The sub-folders and image files of a folder, in the same order on every machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from classroomkd.data.decoding import SUFFIXES
from classroomkd.errors import UserError


def subfolders(path: Path) -> list[str]:
    """The sorted names of the folders in a folder, without hidden ones."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if _is(e.is_dir) and not _is_hidden(e.name))


def _is(kind: Callable[[], bool]) -> bool:
    """What ``kind`` returns; False if it raises OSError, as for a link to itself."""
    with suppress(OSError):
        return kind()
    return False


def _is_hidden(name: str) -> bool:
    """Whether a name is hidden; macOS adds ``__MACOSX`` with metadata to archives."""
    return name.startswith(".") or name == "__MACOSX"


def _natural(name: str) -> tuple[list[int | str], str]:
    """The sort key of natural order, in which digits compare as numbers."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def files_in(path: Path) -> tuple[list[Path], list[Path]]:
    """A folder's image files in natural order, and the other files; hidden files are neither."""
    images: list[str] = []
    others: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if _is_hidden(entry.name) or _is(entry.is_dir):
                continue
            is_image = entry.name.lower().endswith(SUFFIXES)
            if is_image and not _is(entry.is_file):
                raise UserError(f"{path / entry.name} is not a file, or a broken link: remove it")
            (images if is_image else others).append(entry.name)
    images, others = sorted(images, key=_natural), sorted(others)
    return [path / name for name in images], [path / name for name in others]


def folders_below(path: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """``path`` and all folders below it; links are followed, cycles are not."""
    status = path.stat()
    this = status.st_dev, status.st_ino
    if this in above:
        return
    yield path
    for name in sorted(subfolders(path), key=_natural):
        yield from folders_below(path / name, (*above, this))
