"""What a recipe's keys have to do with a run's result: metadata on the recipe's fields.

A result is identified by the values of the keys marked "recipe" or "teaching", by its images and by
its seed. All that tells results apart reads the marks: the comparison of runs in reports, the check
of a resumed table's runs, and the keys of stored mentors.
"""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_type_hints

Mark = Literal["recipe", "teaching", "seed", "place", "machine"]
"""A field's part in the identity of a result:

- "recipe" (where nothing is marked): it is part of what is tried.
- "teaching": likewise, but the student trained alone does not depend on it.
- "seed": runs of one recipe differ in it.
- "place": where the images lie; their content counts, not their place.
- "machine": how a run is computed and recorded. Results differ by no more than rounding.
"""


def marked(mark: Mark = "recipe", *, mentors: bool = False) -> dict[str, Any]:
    """The metadata of a dataclass's field with a ``mark``.

    With ``mentors`` a trained mentor depends on its value; that is for values that do not belong to
    a mentor, to its training or to the images, which are known to count.
    """
    return {"mark": mark, "mentors": mentors}


@cache
def marks(section: type) -> dict[str, Mark]:
    """The marks of a dataclass's fields by dotted name; a section's own mark is of all in it."""
    found: dict[str, Mark] = {}
    hints = get_type_hints(section)
    for own in fields(section):
        mark = found[own.name] = own.metadata.get("mark", "recipe")
        if is_dataclass(hints[own.name]):
            inner = marks(hints[own.name])
            found |= {f"{own.name}.{k}": m if mark == "recipe" else mark for k, m in inner.items()}
    return found


def values_without(section: Any, *left_out: Mark) -> dict[str, Any]:
    """The values of a dataclass, nested, as plain ones, without those of the marks ``left_out``."""
    values = asdict(section)
    for own in fields(section):
        inner = getattr(section, own.name)
        if own.metadata.get("mark", "recipe") in left_out:
            del values[own.name]
        elif is_dataclass(inner):
            values[own.name] = values_without(inner, *left_out)
    return values


def mentor_values(section: Any) -> dict[str, Any]:
    """The values of the fields marked ``mentors``, in the order of the fields."""
    return {
        own.name: getattr(section, own.name)
        for own in fields(section)
        if own.metadata.get("mentors")
    }
