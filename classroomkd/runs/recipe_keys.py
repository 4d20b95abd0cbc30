"""The keys of a recipe: their values, types and meanings, and corrections of unknown ones.

The type of a key is that of its field in ``recipe``, and its meaning is the docstring below it.
Those of ``loss`` and ``method_options`` are documented by the loss and the methods.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from classroomkd import docstrings
from classroomkd.loss.methods import method_names
from classroomkd.runs.recipe import LossConfig, MentorCacheConfig, MentorConfig, Recipe

_NEAR = 0.8  # difflib's ratio from which a name was probably meant
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list[float]: "a list of numbers",
    list[MentorConfig]: "a list of names",
    dict[str, Any]: "names and values",
}


@dataclass(frozen=True)
class Key:
    """A key by its dotted ``name``, as on the command line; N stands for an index from 0.

    ``value`` is the text that sets it, None for keys of each mentor.
    """

    name: str
    value: str | None
    kind: str
    meaning: str


def keys(recipe: Recipe) -> list[Key]:
    """All keys, in order, with the values of ``recipe``, and the options of its method only."""
    return list(_keys(Recipe, recipe, ""))


def options(method: str) -> list[Key]:
    """The keys of a method's own options, with their defaults."""
    section = "loss." if method == "classroom" else "method_options."
    return [key for key in keys(Recipe(method=method)) if key.name.startswith(section)]


def _keys(kind: type, values: Any, prefix: str) -> Iterator[Key]:
    definition = docstrings.definition(Path(inspect.getfile(kind)), kind.__name__)
    assert isinstance(definition, ast.ClassDef)
    meanings = docstrings.fields(definition)
    if kind is LossConfig:
        meanings = method_names.entry("classroom").meanings
    for name, hint in get_type_hints(kind).items():
        value = None if values is None else getattr(values, name)
        if hint is LossConfig and values.method != "classroom":
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _keys(hint, value, f"{prefix}{name}.")
            continue
        if hint == MentorCacheConfig | None:
            whole = "null" if value is None else as_text(vars(value))
            yield Key(f"{prefix}{name}", whole, "null or keys", meanings[name])
            yield from _keys(MentorCacheConfig, value, f"{prefix}{name}.")
            continue
        text = None if values is None else as_text(value)
        yield Key(f"{prefix}{name}", text, _words(hint), meanings[name])
        if name == "mentors":
            yield from _keys(MentorConfig, None, f"{prefix}{name}.N.")
        if name == "method_options" and values.method != "classroom":
            yield from _options(values.method, values.method_options)


def _options(method: str, given: dict[str, Any]) -> Iterator[Key]:
    entry = method_names.entry(method)
    for option, default in entry.options.items():
        kind = int if default is None else type(default)
        words = _words(kind) + (" or null" if default is None else "")
        text = as_text(given.get(option, default))
        yield Key(f"method_options.{option}", text, words, entry.meanings[option])


def as_text(value: Any) -> str:
    """A value as written after ``=`` on the command line."""
    if isinstance(value, MentorConfig):
        parts = {key: part for key, part in vars(value).items() if part is not None}
        if parts.keys() <= {"source", "at"}:
            return value.source if value.at is None else f"{value.source}@{value.at}"
        return "{" + ",".join(f"{key}: {as_text(part)}" for key, part in parts.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {as_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value)


def _words(hint: Any) -> str:
    """A description of the values of a field."""
    if get_origin(hint) is Literal:
        return _either(get_args(hint))
    if isinstance(hint, types.UnionType):
        return _either([_words(each) for each in get_args(hint)])
    return _WORDS[hint]


def _either(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def suggestions(name: str, method: str = "classroom") -> list[str]:
    """The keys that ``name``, dotted or not, may stand for in a recipe of ``method``.

    Keys of any section with the same last part, or else the nearest names, without the options of
    other methods.
    """
    recipe = Recipe(method=method if method in method_names.names() else "classroom")
    known = [key.name for key in keys(recipe)]
    likeness = {key: _likeness(key, name) for key in known}
    if same := [key for key in known if _last(key) == _last(name)]:
        return sorted(same, key=lambda key: -likeness[key])
    likeness = {key: max(of, _likeness(_last(key), _last(name))) for key, of in likeness.items()}
    best = max(likeness.values())
    return [key for key in known if likeness[key] == best] if best >= _NEAR else []


def unknown_key(name: str, method: str, override: str = "") -> str:
    """The error message for the unknown key ``name`` in a recipe of ``method``, in one line.

    The key comes from the ``override``, like ``name=value``, directly or indirectly.
    """
    name = re.sub(r"\[(\d+)\]", r".\1", name)  # OmegaConf's index of a mentor
    key, equals, value = override.partition("=")
    if not key.startswith(name):
        key, equals = name, ""
    near = [
        re.sub(r"^mentors\.N", index[0], like)
        if (index := re.match(r"mentors\.\d+", key))
        else like
        for like in suggestions(key, method)
    ]
    if "." not in key and not equals:  # of a mapping, whose name may be that of a section
        sections = [field.name for field in fields(Recipe)]
        near = difflib.get_close_matches(key, sections, n=1, cutoff=0.8) or near
    last = _last(key)
    others = [other for other in method_names.names() if other not in (method, "classroom")]
    takers = [other for other in others if last in method_names.entry(other).options]
    if near:
        hint = f"did you mean {_either([f'{like}={value}' if equals else like for like in near])}?"
    elif last in {field.name for field in fields(LossConfig)}:
        hint = f"loss.{last} is for method=classroom"
    elif takers:
        hint = f"method_options.{last} is for {_either([f'method={other}' for other in takers])}"
    else:
        hint = "classroomkd config lists all keys"
    return f"there is no key {key}: {hint}"


def unused_loss(override: str, method: str) -> str:
    """The error message for an ``override`` of loss in a recipe of another ``method``."""
    key, _, value = override.partition("=")
    option, known = _last(key), method_names.entry(method).options
    hint = (
        f"did you mean method_options.{option}={value}?"
        if option in known
        else f"classroomkd config method={method} lists its options"
    )
    return f"{key} is for method=classroom, not method={method}: {hint}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
