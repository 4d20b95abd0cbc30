"""What a command line may name: networks, variants and keys, for its help and its hints."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable


def networks() -> str:
    """How networks are named."""
    from classroomkd.models import names

    return _wrapped(
        [
            "networks:",
            "  NAME          of the zoo: " + ", ".join(names()),
            "  tv:NAME       of torchvision, like tv:resnet34; a mentor comes with its pretrained "
            "weights, a student is trained from new ones",
            "  timm:NAME     of timm, likewise",
            "  NAME@60       a mentor: what the network was after epoch 60 of its training",
            "  PATH          a mentor: a checkpoint (.safetensors, or a PyTorch file with a state "
            "dict; FILE:ENTRY of several in one), or the folder of a run, for its student",
        ],
        indent=16,
    )


def keys(name: str) -> list[str]:
    """The keys of a recipe that an unknown option may mean."""
    from classroomkd.runs.recipe_keys import suggestions

    return suggestions(name)


def keys_of_tables(name: str) -> list[str]:
    """Likewise, but for those that `reproduce` has options for."""
    from classroomkd.reproduce.plan import DECIDED

    return [key for key in keys(name) if key not in DECIDED]


def _wrapped(lines: Iterable[str], indent: int = 2) -> str:
    width = min(shutil.get_terminal_size().columns, 100) - 2
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False)
        for line in lines
    )


def variants() -> str:
    """The names of every table's variants."""
    from classroomkd.loss.methods import names
    from classroomkd.reproduce.tables import TABLES, variant_names

    lines = [f"methods: {', '.join(names())}"]
    lines += [f"variants of {table}: {', '.join(variant_names(table))}" for table in TABLES]
    return _wrapped(lines)
