"""Checks of a command line that need no torch, so that a wrong path is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from classroomkd.errors import UserError

if TYPE_CHECKING:
    from classroomkd.runs.recipe import Recipe


def require_networks(recipe: Recipe) -> None:
    """Raise UserError if a student or mentor is neither a known name nor an existing file."""
    from classroomkd.models.network_names import PRETRAINED, is_checkpoint
    from classroomkd.runs.recipe import teaching

    mentors = teaching(recipe)
    for name in (recipe.student, *(mentor.source for mentor in mentors)):
        if is_checkpoint(name):
            require_checkpoint(name)
        elif name:
            require_network(name)
    for weights in (recipe.init, *(mentor.weights for mentor in mentors)):
        if weights not in (None, PRETRAINED):
            require_checkpoint(weights)
    if recipe.init is not None and not recipe.student:
        raise UserError(f"init: {recipe.init} needs a student, and there is none")
    if is_checkpoint(recipe.student):
        raise UserError(
            f"the student {recipe.student} is a file: name its network, and give the file as --init"
        )


def require_network(name: str) -> None:
    """Raise UserError if ``name`` is neither in the zoo, nor a file that exists."""
    from classroomkd.models.network_names import code_file, is_code, is_external, require_known

    if is_code(name):
        code_file(name)
    elif not is_external(name):
        require_known(name)


def require_images(source: str, remedy: str = "") -> None:
    """Raise UserError, with the ``remedy``, if ``source`` is no named data set or existing path."""
    from classroomkd.data import NAMED_SOURCES

    if source not in NAMED_SOURCES and not Path(source).expanduser().exists():
        raise UserError(f"no such folder: {source}{remedy and f': {remedy}'}")


def require_checkpoint(source: str) -> None:
    """Raise UserError if the checkpoint ``source`` does not exist."""
    from classroomkd.models.network_names import split_entry

    path, _ = split_entry(source)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")


def is_override(text: str) -> bool:
    """Whether ``text`` has the form KEY=VALUE and is neither a file nor NAME=WEIGHTS."""
    from classroomkd.models.network_names import split_weights

    return "=" in text and not Path(text).exists() and split_weights(text)[1] is None
