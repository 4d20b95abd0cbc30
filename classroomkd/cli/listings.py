"""`classroomkd recipes`, `models`, `methods` and `config`, none of which needs torch."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from typing import Any

from classroomkd.cli.arguments import add_command


def add_to(commands: Any) -> None:
    """Add the commands and their options."""
    add_command(commands, recipes, "list the packaged recipes")
    add_command(commands, models, "list the networks of the zoo and their numbers of parameters")
    add_command(commands, methods, "list the distillation methods and their options")
    what = "list every recipe key with its value and meaning"
    add_command(commands, config, what).add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="YAML file or packaged recipe whose values to show instead of the defaults",
    )


def recipes(_: argparse.Namespace) -> None:
    """Print the packaged recipes."""
    from classroomkd.recipes import find, names
    from classroomkd.runs.recipe_layers import mentor, read_with_bases, yaml_mapping

    lines = [("recipe", "student", "mentors")]
    for name in names():
        values: dict[str, Any] = {}
        for part in read_with_bases(find(name)):
            values |= yaml_mapping(*part)
        mentors = (m if isinstance(m, dict) else mentor(m) for m in values["mentors"])
        lines.append((name, values["student"], " ".join(each["source"] for each in mentors)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, student, sources in lines:  # too wide for a table
        print(f"{name:{widths[0]}}  {student:{widths[1]}}  {sources}")


def models(_: argparse.Namespace) -> None:
    """Print the zoo."""
    from classroomkd.models.network_names import SIZES

    print("network        parameters with 100 classes")
    for name, size in SIZES.items():
        print(f"{name:15}{size.parameters:>27,}")
    print("\nand tv:NAME of torchvision and timm:NAME of timm, with their pretrained weights")


def methods(_: argparse.Namespace) -> None:
    """Print every method, what it is, and its options."""
    from classroomkd.loss.methods import method_names
    from classroomkd.runs.recipe_keys import options

    for name in method_names.names():
        entry = method_names.entry(name)
        print(f"method={name}")
        note = " Only the first mentor teaches." if entry.single_mentor else ""
        for paragraph in (f"{entry.title}{note}", f"loss: {entry.loss}", entry.source):
            _print(paragraph, 2)
        for key in options(name):
            print(f"    {key.name}={key.value}  ({key.kind})")
            _print(key.meaning, 6)
        print()
    print("The values are the defaults; classroomkd train takes others in the same form.")


def config(arguments: argparse.Namespace) -> None:
    """Print every key of a recipe with its value, what it may be, and its meaning."""
    from classroomkd.recipes import find
    from classroomkd.runs.recipe import Recipe, load_recipe
    from classroomkd.runs.recipe_keys import keys

    for key in keys(load_recipe(find(arguments.recipe)) if arguments.recipe else Recipe()):
        print(f"{key.name}{'' if key.value is None else f'={key.value}'}  ({key.kind})")
        _print(key.meaning, 4)


def _print(text: str, indent: int) -> None:
    """Print a paragraph of a docstring."""
    text = re.sub(r"\*([^*]+)\*", r"\1", text.replace("`", ""))  # without the markup
    width = min(shutil.get_terminal_size().columns, 100)
    margin = " " * indent
    for line in textwrap.wrap(
        text[:1].upper() + text[1:],
        max(width, 40),
        initial_indent=margin,
        subsequent_indent=margin,
        break_on_hyphens=False,
    ):
        print(line)
