"""Packages that import their exports on first access.

So commands that do not need torch start without it, and using the loss imports nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from classroomkd.errors import missing_of_train


def exports(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of ``package``.

    ``modules`` maps its modules to the names that they export, separated by spaces.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(f"{package}.{homes[name]}")
        except ModuleNotFoundError as error:
            if missing := missing_of_train(error):
                error.add_note(f"{package}.{name} needs {missing}")
            raise
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)  # later accesses do not call this
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
