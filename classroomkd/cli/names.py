"""Names of networks, variants and recipe keys, for help texts and hints."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable


def networks() -> str:
    """How to name networks."""
    from classroomkd.models import names

    return _wrapped(
        [
            "networks:",
            "  NAME          from the zoo: " + ", ".join(names()),
            "  tv:NAME       from torchvision, for example tv:resnet34; mentors are pretrained, a "
            "student starts from random weights without --init",
            "  timm:NAME     from timm, likewise",
            "  FILE.py:NAME  your own: a function or class in a file that takes the number of "
            "classes, or no argument, and returns a torch.nn.Module; package.module:NAME likewise",
            "  NAME=WEIGHTS  mentor: tv:, timm: or your own with a checkpoint's weights, as it "
            "is; with epochs, in a recipe, it is trained from there",
            "  NAME@60       mentor: the network after epoch 60 of its training",
            "  PATH          mentor: a checkpoint (.safetensors, or a PyTorch file with a state "
            "dict; FILE:ENTRY picks one of several), or a run folder, for its student",
        ],
        indent=16,
    )


def keys(name: str) -> list[str]:
    """The recipe keys that an unknown option may mean."""
    from classroomkd.runs.recipe_keys import suggestions

    return suggestions(name)


def keys_of_tables(name: str) -> list[str]:
    """Likewise, without those that `reproduce` has options for."""
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
