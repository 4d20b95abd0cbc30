"""How each recipe key affects the result of a run: metadata on the recipe's fields.

A result is identified by the values of the keys marked "recipe" or "teaching", by its images and by
its seed. The comparison of runs in reports, the check of a resumed table's runs and the keys of
stored mentors all use these marks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_type_hints

Mark = Literal["recipe", "teaching", "seed", "place", "machine"]
"""A field's part in the identity of a result:

- "recipe" (the default): part of the experiment.
- "teaching": likewise, but the student trained alone does not depend on it.
- "seed": runs of one recipe differ in it.
- "place": the path of the images; only their content matters.
- "machine": how a run is computed and recorded. It changes results by rounding at most.
"""


def marked(mark: Mark = "recipe", *, mentors: bool = False) -> dict[str, Any]:
    """The metadata of a dataclass field with a ``mark``.

    ``mentors`` says that trained mentors depend on the value. It is needed only for values outside
    the sections for mentors, their training and the images, on which mentors always depend.
    """
    return {"mark": mark, "mentors": mentors}


@cache
def marks(section: type) -> dict[str, Mark]:
    """The marks of a dataclass's fields by dotted name; a section's mark applies to its fields."""
    found: dict[str, Mark] = {}
    hints = get_type_hints(section)
    for own in fields(section):
        mark = found[own.name] = own.metadata.get("mark", "recipe")
        if is_dataclass(hints[own.name]):
            inner = marks(hints[own.name])
            found |= {f"{own.name}.{k}": m if mark == "recipe" else mark for k, m in inner.items()}
    return found


def values_without(section: Any, *left_out: Mark) -> dict[str, Any]:
    """The values of a dataclass as nested plain values, without fields marked ``left_out``."""
    values = asdict(section)
    for own in fields(section):
        inner = getattr(section, own.name)
        if own.metadata.get("mark", "recipe") in left_out:
            del values[own.name]
        elif is_dataclass(inner):
            values[own.name] = values_without(inner, *left_out)
    return values


def difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference between nested plain values, as text; empty if there is none."""
    for key in {**begun, **now}:
        old, new = begun.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := difference(old, new):
                return f"{key}.{inner}"
        elif old != new:
            return f"{key} {json.dumps(old)}, which is {json.dumps(new)}"
    return ""


def mentor_values(section: Any) -> dict[str, Any]:
    """The values of the fields marked ``mentors``, in the order of the fields."""
    return {
        own.name: getattr(section, own.name)
        for own in fields(section)
        if own.metadata.get("mentors")
    }
