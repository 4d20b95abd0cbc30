"""`classroomkd recipes`, `models`, `methods` and `config`; only `models --features` needs torch."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from typing import Any

from classroomkd.cli.arguments import DEFAULT_IMAGE_SIZE, PIXELS, add_command


def add_to(commands: Any) -> None:
    add_command(commands, recipes, "list the packaged recipes")
    what = "list the networks of the zoo, or the layers of any network"
    parser = add_command(commands, models, what)
    parser.add_argument(
        "network",
        nargs="?",
        metavar="NAME",
        help="a network, as train takes it; given with --features",
    )
    parser.add_argument(
        "--features",
        action="store_true",
        help="list the layers of NAME that methods can compare, with their shapes",
    )
    parser.add_argument(
        "--image-size",
        type=PIXELS,
        default=DEFAULT_IMAGE_SIZE,
        metavar="PIXELS",
        help="width and height of the images (default: %(default)s)",
    )
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


def models(arguments: argparse.Namespace) -> None:
    """Print the zoo, or the layers of a network."""
    if arguments.features != (arguments.network is not None):
        arguments.parser.error("NAME and --features go together")
    if arguments.network is not None:
        _features(arguments.network, arguments.image_size)
        return
    from classroomkd.models.network_names import SIZES

    print("network        parameters with 100 classes")
    for name, size in SIZES.items():
        print(f"{name:15}{size.parameters:>27,}")
    print(
        "\nand tv:NAME of torchvision and timm:NAME of timm, with their pretrained weights, and "
        "your own: FILE.py:NAME or package.module:NAME"
    )


def _features(name: str, image_size: int) -> None:
    """Print the layers of a network that methods can compare."""
    from classroomkd.cli.checks import require_network

    require_network(name)
    from classroomkd.models.stages import layer_shapes, stage_names

    shapes = layer_shapes(name, image_size)
    own = stage_names(name)
    width = max(map(len, shapes), default=0)
    print(f"layers of {name}, channels × height × width for images of {image_size}×{image_size}")
    for path, shape in shapes.items():
        mark = "  a stage" if path in own else ""
        print(f"{path:{width}}  {' × '.join(map(str, shape))}{mark}")
    print("\nfor method_options.student_layers and teacher_layers of fitnet and at, as a,b,c")


def methods(_: argparse.Namespace) -> None:
    """Print every method with its loss, source and options."""
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
    print("The values are the defaults; give others to classroomkd train in the same form.")


def config(arguments: argparse.Namespace) -> None:
    """Print every key of a recipe with its value, type and meaning."""
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
