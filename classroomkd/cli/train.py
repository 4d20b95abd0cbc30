"""`classroomkd train`: train mentors and a student as a recipe says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classroomkd.cli.arguments import add_command, add_run_options, path_option
from classroomkd.cli.checks import require_images
from classroomkd.cli.recipe_options import add_recipe_options, given_options, recipe_of
from classroomkd.errors import UserError

if TYPE_CHECKING:
    from classroomkd.runs.recipe import Recipe
    from classroomkd.runs.training_run import TrainingRun


def add_to(commands: Any) -> None:
    what = "train mentors and a student on your own images"
    parser = add_command(commands, train, what)
    add_recipe_options(parser)
    add_run_options(parser, "train")
    parser.add_argument(
        "--resume",
        type=path_option,
        default=None,
        metavar="DIR",
        help="resume the interrupted run in this folder; takes no other option",
    )


def train(arguments: argparse.Namespace) -> None:
    """Train the recipe given by file, options and overrides, or resume a run."""
    if arguments.resume is not None:
        others = sorted(given_options(arguments).keys() - {"resume"})
        if others:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            options = options.replace("--override", "KEY=VALUE")
            arguments.parser.error(
                f"--resume takes all other options from the run: leave out {options}"
            )
        _resume(arguments.resume)
        return
    recipe = recipe_of(arguments, with_student=True)
    train_recipe(recipe, arguments.out, "train", download=given_options(arguments).get("download"))


def train_recipe(
    recipe: Recipe, out: Path | None, default_out: str, *, download: str | None = None
) -> None:
    """Train and report. The folder is checked before the data is read, which may take long."""
    from classroomkd.runs.paths import choose_folder

    folder = choose_folder(out, default_out)
    run = _run_of(recipe)
    if out is None and run.processes.together:
        raise UserError("several processes need a common run folder: give --out")
    run.processes.wait()  # until each has checked the folder
    _carry_out(run, folder, download=download)


def _resume(out: Path) -> None:
    """Resume the run in ``out``; if only the page of a finished run is missing, write it."""
    from classroomkd.runs.paths import unfinished
    from classroomkd.runs.recipe import load_recipe

    if (out / "summary.json").exists() and not (out / "report.html").exists():
        from classroomkd.report.page import write_report

        print(f"the run in {out} is finished\nreport: {write_report([out])}")
        return
    recipe = load_recipe(unfinished(out), of_run=True)
    if not recipe.data.source:
        raise UserError(
            f"the run in {out} was started in Python: classroomkd.distill(…, out={str(out)!r}, "
            "resume=True) resumes it"
        )
    require_images(recipe.data.source)
    _carry_out(_run_of(recipe), out, resume=True)


def _run_of(recipe: Recipe) -> TrainingRun:
    from rich.console import Console

    from classroomkd.runs.training_run import TrainingRun

    return TrainingRun(recipe, Console())


def _carry_out(
    run: TrainingRun, out: Path, *, download: str | None = None, resume: bool = False
) -> None:
    from classroomkd.report.run_table import results_table
    from classroomkd.runs.images import read_images
    from classroomkd.runs.progress import print_line
    from classroomkd.runs.recipe import split_seed

    sets = read_images(run.recipe.data, split_seed(run.recipe), download)
    summary = run.run(
        sets.train, sets.test, out, resume, validation_set=sets.validation, folders=sets.folders
    )
    run.console.print(results_table(summary))
    print_line(run.console, f"report: {out / 'report.html'}")
