"""`classroomkd check`: find faults in mentors before they are used."""

from __future__ import annotations

import argparse
from typing import Any

from classroomkd.cli.arguments import add_command
from classroomkd.cli.recipe_options import add_recipe_options, lacks, recipe_of


def add_to(commands: Any) -> None:
    what = "look for faults in given mentors, on a few hundred labelled images"
    parser = add_command(commands, check, what)
    add_recipe_options(parser)
    parser.add_argument(
        "--strict",
        action="store_true",
        default=False,
        help="exit with status 1 if anything was found",
    )


def check(arguments: argparse.Namespace) -> int:
    """Print a line per mentor. Returns 1 with --strict if something is wrong, else 0."""
    recipe = recipe_of(arguments)
    if not recipe.mentors:
        lacks(arguments, "--mentors")

    from classroomkd.models.network_names import is_logits
    from classroomkd.runs.given_mentors import check_given, part_to_check
    from classroomkd.runs.images import example_of, network_info, read_images
    from classroomkd.runs.machine import find_device
    from classroomkd.runs.mentor_setup import find_mentors, fit_mentor
    from classroomkd.runs.recipe import split_seed

    device = find_device(recipe.device)
    for config in recipe.mentors:
        if is_logits(config.source):
            print(f"{config.source}: a file of logits of training images: not checked")
    networks = [config for config in recipe.mentors if not is_logits(config.source)]
    mentors = find_mentors(networks, recipe.mentor_training.epochs, print)
    sets = read_images(recipe.data, split_seed(recipe))
    info = network_info("", recipe.data, sets.train)
    for mentor in mentors:
        if mentor.network is None:
            print(f"{mentor.name}: has no weights yet, would be trained first: not checked")
        else:
            fit_mentor(mentor, info, example_of(sets.train, info.image_size), print)
    checks = check_given(mentors, part_to_check(sets.validation, sets.test), info, device)
    for of in checks:
        print(of)
    return int(arguments.strict and any(of.findings for of in checks))
