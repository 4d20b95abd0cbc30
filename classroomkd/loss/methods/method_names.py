"""The methods by name: titles, formulas and options, without importing torch.

All of it is read from the source of each method: its docstrings and its constructor's arguments.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from classroomkd import docstrings
from classroomkd.errors import UserError
from classroomkd.loss.options import LossOptions

CLASSES = {
    "alone": "Alone",
    "classroom": "Classroom",
    "kd": "KD",
    "aver": "AVER",
    "ca_mkd": "CAMKD",
    "dtkd": "DTKD",
    "dkd": "DKD",
    "dist": "DIST",
    "fitnet": "FitNet",
    "at": "AT",
}
"""Each method's class, in the module of its name."""


@dataclass(frozen=True)
class MethodDescription:
    """A method: what it is, its loss, where it comes from, and its options."""

    title: str
    loss: str
    source: str
    single_mentor: bool
    uses_features: bool
    options: dict[str, Any]
    """With their defaults."""
    meanings: dict[str, str]


def names() -> list[str]:
    """The names of the methods."""
    return list(CLASSES)


def class_of(name: str) -> tuple[str, str]:
    """The module and the class of a method; UserError, with the nearest names, if there is none."""
    if name not in CLASSES:
        nearest = ", ".join(difflib.get_close_matches(str(name).lower(), CLASSES, cutoff=0.0))
        raise UserError(f"no method is called {name!r}; the nearest names are {nearest}")
    return f"classroomkd.loss.methods.{name}", CLASSES[name]


@cache
def entry(name: str) -> MethodDescription:
    """A method's entry, read from its source; UserError if there is none of this name."""
    _, class_name = class_of(name)
    file = Path(__file__).with_name(f"{name}.py")
    found = docstrings.definition(file, class_name)
    assert isinstance(found, ast.ClassDef)
    title, _, rest = (ast.get_docstring(docstrings.module(file)) or "").partition("\n\n")
    options, is_open = _arguments(found)
    meanings = docstrings.arguments(found)
    if is_open:  # to those of the loss
        options |= {field.name: field.default for field in fields(LossOptions)}
        definition = docstrings.definition(
            Path(__file__).parents[1] / "definition.py", "classroom_loss"
        )
        meanings = docstrings.arguments(definition) | meanings
    return MethodDescription(
        title=" ".join(title.split()),
        loss=docstrings.summary(found),
        source=" ".join(rest.split()),
        single_mentor=_flag(found, "single_mentor"),
        uses_features=_flag(found, "uses_features"),
        options=options,
        meanings={option: meanings.get(option, "") for option in options},
    )


def require_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise UserError if there is no such method, or it has no such option."""
    known = entry(name).options
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"method {name} has no option {option!r}; {has}")


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raise UserError if the method ``name`` cannot be built with these ``options``.

    Only the method's constructor knows which numbers it takes, and building it imports torch. A
    switch that is given true or false needs no such check, which keeps plans of runs fast.
    """
    require_options(name, options)
    defaults = entry(name).options
    if not all(
        isinstance(given, bool) and isinstance(defaults[o], bool) for o, given in options.items()
    ):
        from classroomkd.loss.methods.creation import create

        create(name, **options)


def _arguments(found: ast.ClassDef) -> tuple[dict[str, Any], bool]:
    """The constructor's arguments that have a default, and whether it takes any others."""
    functions = (node for node in found.body if isinstance(node, ast.FunctionDef))
    arguments = next((node.args for node in functions if node.name == "__init__"), None)
    if arguments is None:
        return {}, False
    last = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    names = [argument.arg for argument in (*last, *arguments.kwonlyargs)]
    defaults = zip(names, [*arguments.defaults, *arguments.kw_defaults], strict=True)
    values = {name: ast.literal_eval(node) for name, node in defaults if node is not None}
    return values, arguments.kwarg is not None


def _flag(found: ast.ClassDef, name: str) -> bool:
    """The value of a class variable that a method sets, or does not."""
    return any(
        isinstance(node, ast.Assign)
        and [getattr(target, "id", None) for target in node.targets] == [name]
        and ast.literal_eval(node.value)
        for node in found.body
    )
