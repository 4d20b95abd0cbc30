"""A method by its name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from classroomkd.errors import UserError
from classroomkd.loss.methods import method_names
from classroomkd.loss.methods.base import Method


def create(name: str, **options: Any) -> Method:
    """The method of this name with these options, the others as they are by default.

    Raises UserError, in one line, if there is no such method, it has no such option, or an option
    is out of its range.
    """
    module, class_name = method_names.class_of(name)
    method_names.require_options(name, options)
    try:
        return getattr(import_module(module), class_name)(**options)
    except UserError as error:
        raise UserError(f"method {name}: {error}") from None
