"""Packaged recipes: one YAML file per classroom, in a folder per data set."""

from __future__ import annotations

import difflib
from pathlib import Path

from classroomkd.errors import UserError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The packaged recipes, like ``cifar100/resnet56-resnet20``, in order.

    Files whose names begin with an underscore are bases of others.
    """
    files = [path for path in _FOLDER.rglob("*.yaml") if not path.name.startswith("_")]
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in files)


def find(name: str | Path) -> Path:
    """The file of the recipe ``name``: a file that exists, or else a packaged recipe.

    Raises UserError, with the nearest names, if it is neither.
    """
    if (path := Path(name).expanduser()).is_file():
        return path
    packaged = names()
    if (called := Path(name).as_posix()) not in packaged:
        nearest = ", ".join(difflib.get_close_matches(called, packaged, cutoff=0.0))
        raise UserError(
            f"{name} is neither a file nor a packaged recipe; the nearest are {nearest} "
            "(classroomkd recipes lists all)"
        )
    return _FOLDER / f"{called}.yaml"
