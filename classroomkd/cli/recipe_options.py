"""The options of the commands that train by a recipe, and the recipe that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from classroomkd.cli import names
from classroomkd.cli.arguments import (
    COUNT,
    DATA_HELP,
    DEFAULT_IMAGE_SIZE,
    PIXELS,
    Parser,
    add_device,
    nested,
    path_option,
)
from classroomkd.cli.checks import is_override, require_images, require_networks

if TYPE_CHECKING:
    from classroomkd.runs.recipe import Recipe

# The options of train that stand for values of its recipe.
_SHORT_FOR = {
    "data": ("data.source",),
    "student": ("student",),
    "mentors": ("mentors",),
    "epochs": ("training.epochs", "mentor_training.epochs"),
    "batch_size": ("training.batch_size", "mentor_training.batch_size"),
    "image_size": ("data.image_size",),
    "loader": ("data.loader",),
    "device": ("device",),
    "seed": ("seed",),
}


def add_recipe_options(parser: Parser) -> None:
    """What makes a recipe. None has a default, for those are the recipe's."""
    parser.more_help = names.networks
    parser.keys = names.keys
    parser.intermixed = True
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # of the networks' lines
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "override",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="any value of the recipe, by its dotted name, like training.weight_decay=1e-4 or "
        "method=kd (classroomkd config lists them all, classroomkd methods the methods)",
    )
    parser.add_argument(
        "--recipe",
        type=path_option,
        metavar="NAME|FILE",
        help="to begin with: a YAML file, or one that comes along (classroomkd recipes lists them)",
    )
    parser.add_argument("--data", type=path_option, metavar="PATH", help=DATA_HELP)
    parser.add_argument("--student", metavar="NAME", help="the network to train, see below")
    parser.add_argument(
        "--mentors",
        nargs="+",
        metavar="NAME|FILE",
        help="networks to train first, pretrained ones, or checkpoints, see below",
    )
    parser.add_argument(
        "--epochs",
        type=COUNT,
        metavar="N",
        help="of the student, and of mentors that no --recipe says otherwise of (default: 240)",
    )
    parser.add_argument("--batch-size", type=COUNT, metavar="N", help="(default: 64)")
    parser.add_argument(
        "--image-size",
        type=PIXELS,
        metavar="PIXELS",
        help=f"width and height that images are brought to (default: {DEFAULT_IMAGE_SIZE})",
    )
    parser.add_argument(
        "--download", choices=("cifar10", "cifar100"), help="fetch this set into PATH first"
    )
    add_device(parser)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that file, options and overrides make, with all checks that need no torch."""
    from classroomkd.recipes import find as find_recipe
    from classroomkd.runs.recipe import load_recipe

    given = given_options(arguments)
    if "data" in given:
        given["data"] = str(arguments.data)
    overrides = list(given.get("override", ()))
    if "mentors" in given:  # an option that takes what follows it, overrides too
        overrides += [text for text in given["mentors"] if is_override(text)]
        given["mentors"] = [text for text in given["mentors"] if not is_override(text)]
    short = {key: given[name] for name, keys in _SHORT_FOR.items() if name in given for key in keys}
    if "recipe" in given:  # a file says what mentors are to have
        short = {key: value for key, value in short.items() if "mentor_training" not in key}
    file = find_recipe(given["recipe"]) if "recipe" in given else None
    recipe = load_recipe(file, overrides, nested(short))
    if not recipe.data.source:
        lacks(arguments, "--data")
    if not recipe.mentors and recipe.method != "alone":
        lacks(arguments, "--mentors")
    if "download" not in given:
        require_images(recipe.data.source)
    require_networks(recipe)
    return recipe


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given."""
    default = arguments.parser.get_default
    return {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("run", "parser") and value != default(name)
    }


def lacks(arguments: argparse.Namespace, option: str) -> NoReturn:
    """Raise the error of an option that neither command line nor recipe gives."""
    arguments.parser.error(f"{option} is required, here or in a --recipe")
