"""Checks of a command line that need no torch, so that a wrong path is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from classroomkd.errors import UserError

if TYPE_CHECKING:
    from classroomkd.runs.recipe import Recipe


def require_networks(recipe: Recipe) -> None:
    """Raise UserError if a student or mentor is neither a known name nor an existing file."""
    from classroomkd.models.network_names import is_checkpoint, is_external, require_known
    from classroomkd.runs.recipe import teaching

    for name in (recipe.student, *(mentor.source for mentor in teaching(recipe))):
        if is_checkpoint(name):
            require_checkpoint(name)
        elif name and not is_external(name):
            require_known(name)


def require_images(source: str) -> None:
    """Raise UserError if ``source`` is neither a named data set nor an existing path."""
    from classroomkd.data import NAMED_SOURCES

    if source not in NAMED_SOURCES and not Path(source).expanduser().exists():
        raise UserError(f"no such folder: {source}")


def require_checkpoint(source: str) -> None:
    """Raise UserError if the checkpoint ``source`` does not exist."""
    from classroomkd.models.network_names import split_entry

    path, _ = split_entry(source)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")


def is_override(text: str) -> bool:
    """Whether ``text`` has the form KEY=VALUE and is not a file."""
    return "=" in text and not Path(text).exists()


def default_device() -> str:
    """The device type to use if none is given."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
