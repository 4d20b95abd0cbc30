"""The options of `train`, `mentors` and `check`, and the recipe that they build."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from classroomkd.cli import names
from classroomkd.cli.arguments import (
    COUNT,
    DATA_HELP,
    Parser,
    add_device,
    add_download,
    add_image_size,
    nested,
    not_empty,
    path_option,
)
from classroomkd.cli.checks import is_override, require_images, require_networks

if TYPE_CHECKING:
    from classroomkd.runs.recipe import Recipe

# Options that are short for recipe keys.
_SHORT_FOR = {
    "data": ("data.source",),
    "student": ("student",),
    "init": ("init",),
    "mentors": ("mentors",),
    "epochs": ("training.epochs", "mentor_training.epochs"),
    "batch_size": ("training.batch_size", "mentor_training.batch_size"),
    "image_size": ("data.image_size",),
    "loader": ("data.loader",),
    "device": ("device",),
    "seed": ("seed",),
}


def add_recipe_options(parser: Parser) -> None:
    """Add the options that build a recipe; the defaults are the recipe's."""
    parser.take_keys(names.keys, names.networks)
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "override",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="set any recipe value by its dotted key, for example training.weight_decay=1e-4 or "
        "method=kd (classroomkd config lists all keys, classroomkd methods all methods)",
    )
    parser.add_argument(
        "--recipe",
        type=path_option,
        metavar="NAME|FILE",
        help="start from a YAML file or a packaged recipe (classroomkd recipes lists those)",
    )
    parser.add_argument("--data", type=path_option, metavar="PATH", help=DATA_HELP)
    parser.add_argument("--student", metavar="NAME", help="network to train (see below)")
    parser.add_argument(
        "--init",
        type=not_empty,
        metavar="FILE",
        help="the student's initial weights: a checkpoint of it, or the word pretrained for its "
        "library's; with a new classifier if theirs is for other classes",
    )
    parser.add_argument(
        "--mentors",
        nargs="+",
        metavar="NAME|FILE",
        help="networks to train first, networks with weights, or checkpoints (see below)",
    )
    parser.add_argument(
        "--epochs",
        type=COUNT,
        metavar="N",
        help="training epochs of the student, and of the mentors unless a --recipe sets theirs "
        "(default: 240)",
    )
    parser.add_argument(
        "--batch-size", type=COUNT, metavar="N", help="images per step (default: 64)"
    )
    add_image_size(parser)
    add_download(parser, "PATH")
    add_device(parser)


def recipe_of(arguments: argparse.Namespace, *, with_student: bool = False) -> Recipe:
    """Build the recipe from file, options and overrides; run all checks that need no torch.

    ``with_student`` says that a student is required.
    """
    from classroomkd.recipes import find as find_recipe
    from classroomkd.runs.recipe import load_recipe

    given = given_options(arguments)
    if "data" in given:
        given["data"] = str(arguments.data)
    overrides = list(given.get("override", ()))
    if "mentors" in given:  # nargs="+" takes the overrides that follow too
        overrides += [text for text in given["mentors"] if is_override(text)]
        given["mentors"] = [text for text in given["mentors"] if not is_override(text)]
    short = {key: given[name] for name, keys in _SHORT_FOR.items() if name in given for key in keys}
    if "recipe" in given:  # --epochs does not change what a file sets for mentors
        short = {key: value for key, value in short.items() if "mentor_training" not in key}
    file = find_recipe(given["recipe"]) if "recipe" in given else None
    recipe = load_recipe(file, overrides, nested(short))
    required = {
        "--data": recipe.data.source,
        "--student": recipe.student or not with_student,
        "--mentors": recipe.mentors or recipe.method == "alone",
    }
    if missing := [option for option, value in required.items() if not value]:
        lacks(arguments, *missing)
    if "download" not in given:
        is_cifar = "cifar" in f"{given.get('recipe', '')} {recipe.data.source}".lower()
        require_images(recipe.data.source, "--download cifar100 makes it" if is_cifar else "")
    require_networks(recipe)
    return recipe


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options given on the command line, by name."""
    default = arguments.parser.get_default
    return {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("run", "parser") and value != default(name)
    }


def lacks(arguments: argparse.Namespace, *options: str) -> NoReturn:
    """Report that neither the command line nor the recipe gives required values."""
    parser: argparse.ArgumentParser = arguments.parser
    verb = "is" if len(options) == 1 else "are"
    parser.error(f"{' and '.join(options)} {verb} required, here or in a --recipe")
