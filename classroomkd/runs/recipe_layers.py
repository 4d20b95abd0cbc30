"""Read recipe files and overrides: YAML, in which a network may be given by its name alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from classroomkd import recipes
from classroomkd.errors import UserError
from classroomkd.models.network_names import split_weights

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # eight times as fast

# The keys of a student's mapping, and the recipe keys that they set.
_STUDENT = {
    "source": "student",
    "weights": "init",
    "mean": "data.mean",
    "std": "data.std",
    "epochs": "training.epochs",
}
_NUMBER_OR_TEXT = ("task_weight", "mentor_weight")  # of loss


def read(file: Path) -> bytes:
    """The content of a file; UserError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def read_with_bases(file: Path) -> tuple[tuple[Path, bytes], ...]:
    """A recipe file with its content, preceded by its ``base``, the base's base, and so on.

    A base is a file, relative to the file that names it, or else a packaged recipe.

    Raises UserError if a file cannot be read or is not YAML, or if the bases form a cycle.
    """
    chain = [(file, read(file))]
    while (base := yaml_mapping(*chain[0]).get("base")) is not None:
        named_by = chain[0][0]
        beside = named_by.parent / str(base)
        try:
            file = beside if beside.is_file() else recipes.find(str(base))
        except UserError as error:
            raise UserError(f"{named_by}: base: {error}") from None
        if any(file.samefile(other) for other, _ in chain):
            raise UserError(f"{named_by}: base: {base} is based on this file itself")
        chain.insert(0, (file, read(file)))
    return tuple(chain)


def yaml_mapping(file: Path, content: bytes) -> dict[str, Any]:
    """The mapping in a YAML file's ``content``; UserError if it is anything else."""
    try:
        mapping = yaml.load(content, _LOADER)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise UserError(f"{file} is not a recipe, but a {type(mapping).__name__}")
    return mapping


def layer(values: Mapping[str, Any]) -> Any:
    """A recipe's values with abbreviated mentors and a student's mapping expanded."""
    values = dict(values)
    given = _student(values.get("student"))
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        if section:
            values[section] = {**(values.get(section) or {}), name: value}
        else:
            values[key] = value
    if isinstance(values.get("mentors"), list):
        values["mentors"] = [
            mentor(one) if isinstance(one, str) else one for one in values["mentors"]
        ]
    if isinstance(loss := values.get("loss"), Mapping):
        # OmegaConf accepts an integer for a float, but not in a union with str.
        whole = {key: float(loss[key]) for key in _NUMBER_OR_TEXT if type(loss.get(key)) is int}
        values["loss"] = {**loss, **whole}
    return OmegaConf.create(values)


def _student(value: Any) -> dict[str, Any]:
    """The dotted keys set by a student's mapping, or by ``NAME=WEIGHTS``."""
    if isinstance(value, str):
        name, weights = split_weights(value)
        return {} if weights is None else {"student": name, "init": weights}
    if not isinstance(value, Mapping):
        return {}
    if unknown := [key for key in value if key not in _STUDENT]:
        raise UserError(f"student has {', '.join(_STUDENT)}, not {unknown[0]}")
    if "source" not in value:
        raise UserError("student: give its source, the name of a network")
    return {_STUDENT[key]: of for key, of in value.items()}


def mentor(text: str) -> dict[str, Any]:
    """Parse a mentor written as a name, a path, ``NAME=WEIGHTS``, or ``resnet20@60``."""
    source, weights = split_weights(text)
    if weights is not None:
        return {"source": source, "weights": weights}
    name, _, epoch = text.rpartition("@")
    if name and epoch.isdecimal() and not Path(text).exists():
        return {"source": name, "at": int(epoch)}
    return {"source": text}


def override(recipe: Any, key: str, value: Any) -> None:
    """Set the dotted ``key`` of a merged recipe; a mentor may be given by its name alone."""
    if key in ("mentors", "loss"):
        value = layer({key: value})[key]
    elif key == "student" and (given := _student(value)):
        for dotted, one_value in given.items():
            OmegaConf.update(recipe, dotted, one_value)
        return
    elif key in [f"loss.{name}" for name in _NUMBER_OR_TEXT]:
        name = key.removeprefix("loss.")
        value = layer({"loss": {name: value}}).loss[name]
    elif key.startswith("mentor_cache.") and recipe.mentor_cache is None:
        OmegaConf.update(recipe, "mentor_cache", {})
    one = re.match(r"(mentors\.(-?\d+))(?:\.(.*))?$", key)
    if one and not 0 <= int(one[2]) < len(recipe.mentors):
        raise ValueError(f"there are {len(recipe.mentors)} mentors, counted from 0")
    if one and one[3] in (None, "source") and isinstance(value, str):
        others = {} if one[3] else dict.fromkeys(("epochs", "at", "weights", "mean", "std"))
        key, value = one[1], others | mentor(value)
    OmegaConf.update(recipe, key, value)


def value_of(text: str) -> Any:
    """Parse a value as OmegaConf does, with 1e-4 as a number; ValueError if that fails."""
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([f"_={text}"]))
    except yaml.MarkedYAMLError as error:
        raise ValueError(
            f"it is not YAML: {error.problem}; quote it or close its brackets"
        ) from None
    except GrammarParseError:
        raise ValueError("${…} is for another key, like ${seed}") from None
    assert isinstance(values, dict)
    return values["_"]


def reason(error: Exception) -> str:
    """OmegaConf's error message, in terms of recipe keys instead of OmegaConf's classes."""
    text, key = str(error).splitlines()[0], getattr(error, "full_key", None)
    where = f"{key}: " if key else ""
    if "is not a ListConfig" in text:
        return f"{where}must be a list, like [a,b]"
    if "Cannot convert" in text and "to string" in text:
        return f"{where}must be one text, not {text.partition('string: ')[2][1:-1]}"
    if wrong := re.search(r"Value '(.*)' of type .* type hint '.*Union\[float, str\]", text):
        return f"{where}must be a number or a text, not {wrong[1]}"
    if "missing mandatory value" in text:
        return f"{where}needs a value: ??? means that it is missing"
    if name := re.search(r"Interpolation key '(.*)' not found", text):
        return f"{where}there is no key {name[1]} for ${{{name[1]}}} to stand for"
    if wrong := re.search(r"is not a subclass of (\w+)Config\. value: (.*)", text):
        return f"{key or wrong[1].lower()} must be like {{name: value}}, not {wrong[2]}"
    return f"{where}{text}"
