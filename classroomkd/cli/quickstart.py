"""`classroomkd quickstart`: a small classroom on scikit-learn's digits."""

from __future__ import annotations

import argparse
from typing import Any

from classroomkd.cli.arguments import COUNT, add_command, add_run_options
from classroomkd.cli.train import train_recipe


def add_to(commands: Any) -> None:
    what = "train three mentors and a student on scikit-learn's handwritten digits, on the CPU"
    parser = add_command(commands, quickstart, what)
    parser.add_argument(
        "--epochs",
        type=COUNT,
        default=12,
        metavar="N",
        help="training epochs of student and teacher (default: %(default)s); the peers train for a "
        "third and a fifth as many",
    )
    add_run_options(parser, "quickstart")


def quickstart(arguments: argparse.Namespace) -> None:
    """Train a small classroom on scikit-learn's digits."""
    from classroomkd.runs.recipe import load_recipe

    epochs = arguments.epochs
    recipe = load_recipe(
        values={
            "student": "resnet8",
            # A teacher, and two peers that are weaker because they are smaller and trained less.
            "mentors": [
                "resnet20",
                {"source": "resnet14", "epochs": max(epochs // 3, 1)},
                {"source": "resnet8", "epochs": max(epochs // 5, 1)},
            ],
            "data": {
                "source": "digits",
                "image_size": 16,
                "test_share": 1 / 3,
                "validation": 0.0,  # no epoch is selected
                "loader": arguments.loader,
            },
            "training": {"epochs": epochs},
            "mentor_training": {"epochs": epochs},
            "seed": arguments.seed,
            "store": False,  # show the whole process every time
            "device": "cpu",
            # Networks this small gain little from a second thread, and on a busy machine they lose
            # most of their speed waiting for it. One thread also makes the numbers independent of
            # the number of cores.
            "threads": 1,
        }
    )
    train_recipe(recipe, arguments.out, "quickstart")
