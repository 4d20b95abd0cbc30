"""`classroomkd mentors`: train the mentors of a recipe into the store."""

from __future__ import annotations

import argparse
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classroomkd.cli.arguments import COUNT, add_command, add_run_options
from classroomkd.cli.recipe_options import add_recipe_options, given_options, lacks, recipe_of
from classroomkd.cli.train import train_recipe
from classroomkd.errors import UserError

if TYPE_CHECKING:
    from classroomkd.runs.recipe import Recipe


def add_to(commands: Any) -> None:
    what = "train the mentors of a recipe that are not in the store yet"
    parser = add_command(commands, mentors, what)
    add_recipe_options(parser)
    add_run_options(parser, "mentors")
    parser.add_argument(
        "--at-once",
        type=COUNT,
        default=1,
        metavar="N",
        help="train N mentors in parallel on the device, one process each, for GPUs that one does "
        "not fill; with --out, the same command resumes; without it, the run folder is removed "
        "when all are in the store (default: 1)",
    )


def mentors(arguments: argparse.Namespace) -> int:
    """Train the mentors, in parallel if asked. Returns 1 if a training failed, else 0."""
    recipe, download = _mentors_recipe(arguments), given_options(arguments).get("download")
    if arguments.at_once == 1:
        train_recipe(recipe, arguments.out, "mentors", download=download)
        return 0
    if download:
        raise UserError("--download and --at-once cannot be combined: download the images first")
    return _train_at_once(recipe, arguments.at_once, arguments.out)


def _train_at_once(recipe: Recipe, at_once: int, given_out: Path | None) -> int:
    """Train the mentors in processes, in a folder that is removed if it was not ``given_out``."""
    import shutil

    import yaml
    from rich.console import Console

    from classroomkd.files import atomic_write
    from classroomkd.reproduce.plan import mentors_plan
    from classroomkd.reproduce.runner import Runner, check_devices
    from classroomkd.runs.machine import find_device
    from classroomkd.runs.paths import choose_folder
    from classroomkd.runs.progress import print_line
    from classroomkd.runs.recipe import load_recipe, to_dict
    from classroomkd.runs.store import MentorStore

    device = recipe.device or str(find_device(None))
    check_devices([device])
    out = given_out or choose_folder(None, "mentors")
    out.mkdir(parents=True, exist_ok=given_out is not None)
    file = out / "recipe.yaml"
    # Mentors are trained without the loss; earlier versions wrote fewer of its values.
    if file.exists() and replace(load_recipe(file), loss=recipe.loss) != recipe:
        raise UserError(f"{out} was started with another recipe: give --out a new folder")
    atomic_write(file, yaml.safe_dump(to_dict(recipe), sort_keys=False))
    console = Console()
    runner = Runner(mentors_plan(recipe, file), out, [device] * at_once, console)
    try:
        runner.run()
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"all runs are kept in {out}: the same command with --out {out} resumes",)
        raise
    if runner.failed:
        return 1
    store = MentorStore()
    if not store.holds_all(out.rglob("mentors/*.safetensors")):
        print_line(console, f"not all mentors are in the store: see {out}")
        return 0
    print_line(console, f"the mentors are in {store.folder}")
    if given_out is None:
        shutil.rmtree(out)
        with suppress(OSError):  # unless there are other runs
            out.parent.rmdir()
    return 0


def _mentors_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe given by file, options and overrides, without its student."""
    recipe = recipe_of(arguments)
    if not recipe.mentors:
        lacks(arguments, "--mentors")
    if not recipe.store:
        raise UserError("mentors are trained for the store: leave out store=false")
    return replace(recipe, student="")
