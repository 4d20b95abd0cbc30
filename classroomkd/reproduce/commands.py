"""The commands that run many trainings, several at once: `reproduce` and `mentors`.

A plan takes no torch: what does is imported where it is used.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from classroomkd.data import NAMED_SOURCES, cifar, list_source
from classroomkd.errors import UserError
from classroomkd.files import atomic_write
from classroomkd.report.numbers import duration
from classroomkd.reproduce.plan import Plan, make_plan, mentors_plan, require_same_recipe
from classroomkd.reproduce.results import write_results
from classroomkd.reproduce.runner import Runner, check_devices
from classroomkd.reproduce.status import seconds_left, status, tasks_left
from classroomkd.training.commands import mentors as one_by_one
from classroomkd.training.commands import mentors_recipe, require_networks
from classroomkd.training.config import load_recipe, to_dict
from classroomkd.training.folders import choose_folder


def reproduce(arguments: argparse.Namespace) -> int:
    """Run what is left of a table and write it; 1 if a run failed, else 0."""
    console = Console()
    lists = ("methods", "classrooms", "devices")  # options that take what follows them
    given = {name: list(getattr(arguments, name) or ()) for name in lists}
    overrides = list(arguments.override)
    for values in given.values():
        overrides += [text for text in values if _is_override(text)]
        values[:] = [text for text in values if not _is_override(text)]
    check_devices(given["devices"])
    shard = _shard(arguments.shard) if arguments.shard else (1, 1)
    if arguments.data is not None:
        _require_folder(str(arguments.data))
    whole = make_plan(
        arguments.table,
        data=arguments.data,
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        classrooms=given["classrooms"],
        method_names=given["methods"],
        overrides=overrides,
    )
    plan = whole.shard(*shard) if arguments.shard else whole
    out = arguments.out or Path("reproduce") / arguments.table
    for task in plan.runs:
        require_networks(task.recipe)
        if (out / task.id / "config.yaml").exists():
            require_same_recipe(task, out / task.id)
    for run in plan.runs:
        source = run.recipe.data.source
        if not source and not arguments.plan:
            arguments.parser.error(f"--data is required: {run.arguments[2]} does not name any")
    for source in {run.recipe.data.source for run in plan.runs} - {""}:
        _require_folder(source)
        if source not in NAMED_SOURCES and not cifar.find(Path(source)):
            list_source(source)  # which says what is wrong with it
    _print_plan(plan, out, len(given["devices"]) or 1, console)
    if arguments.plan:
        return 0
    from classroomkd.reproduce.page import write_tables

    devices = given["devices"] or [_default_device()]
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(plan, out, devices, console)
    order = [run.id for run in whole.runs]
    try:
        runner.run()
    except KeyboardInterrupt as interrupt:
        write_tables(write_results(arguments.table, out, order), out)
        interrupt.args = (f"all runs are kept in {out}: the same command goes on",)
        raise
    results = write_results(arguments.table, out, order)
    pages = write_tables(results, out)
    _print_results(results, console)
    for path in (out / "results.json", out / "results.csv", *pages):
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    if runner.failed:
        names = ", ".join(task.id for task in runner.failed)
        console.print(f"failed: {names}", markup=False, highlight=False, soft_wrap=True)
    return 1 if runner.failed else 0


def mentors(arguments: argparse.Namespace) -> int:
    """Train the mentors of a recipe, several at once if asked; 1 if a training failed, else 0."""
    if arguments.at_once == 1:
        one_by_one(arguments)
        return 0
    recipe, console = mentors_recipe(arguments), Console()
    if getattr(arguments, "download", None):
        raise UserError("--download and --at-once do not go together: fetch the images first")
    device = recipe.device or _default_device()
    check_devices([device])
    out = arguments.out or choose_folder(None, "mentors")
    out.mkdir(parents=True, exist_ok=arguments.out is not None)  # what is chosen here goes again
    file = out / "recipe.yaml"
    if file.exists() and load_recipe(file) != recipe:
        raise UserError(f"{out} was begun with another recipe: give --out a new folder")
    atomic_write(file, yaml.safe_dump(to_dict(recipe), sort_keys=False))
    plan = mentors_plan(recipe, file)
    runner = Runner(plan, out, [device] * arguments.at_once, console)
    try:
        runner.run()
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"all runs are kept in {out}: the same command with --out {out} goes on",)
        raise
    if runner.failed:
        return 1
    from classroomkd.training.store import MentorStore

    store = MentorStore()
    kept = store.holds_all(out.rglob("mentors/*.safetensors"))
    where = (
        f"the mentors are in {store.folder}"
        if kept
        else f"not all mentors are in the store: see {out}"
    )
    console.print(where, markup=False, highlight=False, soft_wrap=True)
    if kept and arguments.out is None:
        shutil.rmtree(out)
        with suppress(OSError):  # unless there are other runs
            out.parent.rmdir()
    return 0


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _require_folder(source: str) -> None:
    """Raise UserError if there is no folder of images at ``source``."""
    if source not in NAMED_SOURCES and not Path(source).expanduser().is_dir():
        raise UserError(
            f"no folder at {Path(source).expanduser().absolute()}: give --data one with the images"
        )


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard must be like 1/4, the first of four, not {text}")
    return number, count


def _print_plan(plan: Plan, out: Path, at_once: int, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("", "done", "begun", "left"):
        table.add_column(column, justify="right" if column else "left")
    states = {task.id: status(task, out) for task in (*plan.mentors, *plan.runs)}
    lines: dict[str, Counter[str]] = {}
    for task in (*plan.mentors, *plan.runs):
        state = states[task.id]
        is_run = task.id.startswith("runs/")
        name = task.id.removeprefix("runs/").rpartition("/")[0] if is_run else "mentors"
        kind = "done" if state.finished else "begun" if state.epochs else "left"
        lines.setdefault(name, Counter())[kind] += 1
    for name, counts in lines.items():
        table.add_row(name, *(str(counts[kind] or "–") for kind in ("done", "begun", "left")))
    console.print(table)
    left = tasks_left(plan, out)
    mentors = sum(task in plan.mentors for task in left)
    time = duration(seconds_left(plan, out, at_once))
    console.print(
        f"{len(left) - mentors} of {len(plan.runs)} runs left, before them {mentors} of "
        f"{len(plan.mentors)} trainings of mentors; time left with {at_once} at once: {time}",
        highlight=False,
        soft_wrap=True,
    )


def _print_results(results: Mapping[str, Any], console: Console) -> None:
    from classroomkd.reproduce.page import result_cells

    columns, rows = result_cells(results)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    kept = [columns.index(name) for name in ("classroom", "variant", "seeds", "last", "best")]
    for place in kept:
        table.add_column(columns[place], justify="left" if place < 2 else "right")
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    console.print(table)
