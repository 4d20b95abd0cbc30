"""`classroomkd reproduce`: run everything that a table needs, and write the table."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classroomkd.cli import names
from classroomkd.cli.arguments import COUNT, DATA_HELP, NATURAL, add_command, path_option
from classroomkd.cli.checks import is_override, require_images, require_networks
from classroomkd.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from classroomkd.reproduce.plan import Plan


def add_to(commands: Any) -> None:
    what = "run everything that a table needs, and write it beside the published numbers"
    parser = add_command(commands, reproduce, what)
    parser.take_keys(names.keys_of_tables, names.variants)
    parser.add_argument(
        "table",
        metavar="TABLE",
        choices=("main", "ablation", "methods", "ca_mkd", "temperature", "peers", "multi-teacher"),
        help="%(choices)s",
    )
    parser.add_argument(
        "override",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="set a recipe value of every run by its dotted key; use threads=1 for several runs at "
        "once on a CPU",
    )
    parser.add_argument("--data", type=path_option, metavar="PATH", help=DATA_HELP)
    parser.add_argument(
        "--seeds",
        type=NATURAL,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="seeds of the students, which share their mentors (default: 0 1 2)",
    )
    parser.add_argument(
        "--epochs",
        type=COUNT,
        metavar="N",
        help="training epochs of the students; all schedules are scaled (default: the recipe's)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help="run only these variants of the table (see below), or other methods",
    )
    parser.add_argument(
        "--classrooms",
        nargs="+",
        default=[],
        metavar="NAME|FILE",
        help="use these recipes instead of the table's (see classroomkd recipes)",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        default=None,
        metavar="NAME",
        help="devices to use, one run at a time on each, for example cuda:0 cuda:1; a device named "
        "twice takes two (default: cuda if available, else cpu)",
    )
    parser.add_argument(
        "--mentor-cache",
        choices=("float32", "float16"),
        help="cache the mentors' logits once for all runs, which then have the same batches: seeds "
        "differ only in the students' initial weights",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="run only the I-th of N parts (from 1) and the mentors it needs; parts merge if they "
        "share --out or their run folders are copied into one",
    )
    parser.add_argument(
        "--out", type=path_option, metavar="DIR", help="output folder (default: reproduce/TABLE)"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="show what is done and what remains, without running anything",
    )


def reproduce(arguments: argparse.Namespace) -> int:
    """Run the remaining runs of a table and write it. Returns 1 if a run failed, else 0."""
    from rich.console import Console

    from classroomkd.reproduce.plan import make_plan
    from classroomkd.reproduce.runner import check_devices

    console = Console()
    lists = ("methods", "classrooms", "devices")  # options with several values
    given = {name: list(getattr(arguments, name) or ()) for name in lists}
    overrides = list(arguments.override)
    for values in given.values():
        overrides += [text for text in values if is_override(text)]
        values[:] = [text for text in values if not is_override(text)]
    check_devices(given["devices"])
    shard = _shard(arguments.shard) if arguments.shard else (1, 1)
    if arguments.data is not None:
        _require_images(str(arguments.data))
    whole = make_plan(
        arguments.table,
        data=arguments.data,
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        classrooms=given["classrooms"],
        method_names=given["methods"],
        mentor_cache=arguments.mentor_cache,
        overrides=overrides,
    )
    plan = whole.shard(*shard) if arguments.shard else whole
    out = arguments.out or Path("reproduce") / arguments.table
    _check_runs(plan, out, arguments)
    _print_plan(plan, out, len(given["devices"]) or 1, console)
    _print_saved(plan, console)
    if arguments.plan:
        return 0
    from classroomkd.runs.machine import find_device

    devices = given["devices"] or [str(find_device(None))]
    return _carry_out(arguments.table, plan, [run.id for run in whole.runs], devices, out, console)


def _carry_out(
    table: str,
    plan: Plan,
    order: Sequence[str],
    devices: Sequence[str],
    out: Path,
    console: Console,
) -> int:
    """Run ``plan`` and write the table, with runs in ``order``. Returns 1 if a run failed, else 0.

    An interruption writes the table of the runs so far.
    """
    from classroomkd.report.table_page import write_tables
    from classroomkd.reproduce.collect import write_results
    from classroomkd.reproduce.runner import Runner
    from classroomkd.reproduce.tables import TABLES
    from classroomkd.runs.progress import print_line

    title = TABLES[table].title
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(plan, out, devices, console)
    try:
        runner.run()
    except KeyboardInterrupt as interrupt:
        write_tables(write_results(table, out, order), title, out)
        interrupt.args = (f"all runs are kept in {out}: the same command resumes",)
        raise
    results = write_results(table, out, order)
    pages = write_tables(results, title, out)
    _print_results(results, console)
    for path in (out / "results.json", out / "results.csv", *pages):
        print_line(console, f"written: {path}")
    if runner.failed:
        print_line(console, f"failed: {', '.join(task.id for task in runner.failed)}")
    return int(bool(runner.failed))


def _check_runs(plan: Plan, out: Path, arguments: argparse.Namespace) -> None:
    """Raise UserError for missing networks or images, or runs that were started otherwise."""
    from classroomkd.data import NAMED_SOURCES, cifar, list_source
    from classroomkd.reproduce.plan import require_same_recipe

    for task in plan.runs:
        require_networks(task.recipe)
        if (out / task.id / "config.yaml").exists():
            require_same_recipe(task, out / task.id)
        if not task.recipe.data.source and not arguments.plan:
            arguments.parser.error(f"--data is required: {task.arguments[2]} does not name any")
    for source in {task.recipe.data.source for task in plan.runs} - {""}:
        _require_images(source)
        if source not in NAMED_SOURCES and not cifar.find(Path(source)):
            list_source(source)  # it reports errors in the source


def _require_images(source: str) -> None:
    folder = Path(source).expanduser().absolute()
    how = f"classroomkd data info {folder} --download cifar100 makes it"
    require_images(source, f"give --data one with the images ({how})")


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard must be like 1/4, the first of four, not {text}")
    return number, count


def _print_plan(plan: Plan, out: Path, at_once: int, console: Console) -> None:
    from classroomkd.report.numbers import duration
    from classroomkd.report.run_table import terminal_table
    from classroomkd.reproduce.status import seconds_left, status, tasks_left
    from classroomkd.runs.progress import print_line

    states = {task.id: status(task, out) for task in (*plan.mentors, *plan.runs)}
    lines: dict[str, Counter[str]] = {}
    for task in (*plan.mentors, *plan.runs):
        state = states[task.id]
        is_run = task.id.startswith("runs/")
        name = task.id.removeprefix("runs/").rpartition("/")[0] if is_run else "mentors"
        kind = "done" if state.finished else "begun" if state.epochs else "left"
        lines.setdefault(name, Counter())[kind] += 1
    kinds = ("done", "begun", "left")
    rows = [[name, *(str(of[kind] or "–") for kind in kinds)] for name, of in lines.items()]
    console.print(terminal_table(("", *kinds), rows))
    left = tasks_left(plan, out)
    mentors = sum(task in plan.mentors for task in left)
    time = duration(seconds_left(plan, out, at_once))
    print_line(
        console,
        f"left: {mentors} of {len(plan.mentors)} trainings of mentors, {len(left) - mentors} of "
        f"{len(plan.runs)} runs; time left, {at_once} at a time: {time}",
    )


def _print_saved(plan: Plan, console: Console) -> None:
    """Print the work that the mentor cache saves, and what still differs between seeds."""
    from classroomkd.reproduce.sharing import cache_bytes
    from classroomkd.runs.progress import print_line
    from classroomkd.training.logits_files import size_text

    saved = sum(run.saved for run in plan.runs)
    if saved:
        takes = ""
        if all(run.recipe.data.source for run in plan.runs):
            takes = f" and takes {size_text(cache_bytes(plan.runs))}"
        share = saved / (saved + sum(run.work for run in plan.runs))
        print_line(
            console,
            "mentor cache: runs with the same batches share the mentors' logits, "
            f"which saves {share:.0%} of the runs' operations{takes}",
        )
    if any(run.recipe.data_seed is not None for run in plan.runs):
        print_line(
            console,
            "data_seed: all seeds have the same batches and augmentation, and differ only in the "
            "students' initial weights",
        )


def _print_results(results: Mapping[str, Any], console: Console) -> None:
    from classroomkd.report.run_table import terminal_table
    from classroomkd.report.table_page import result_cells

    columns, rows = result_cells(results)
    shown = ("classroom", "variant", "seeds", "last", "best")
    kept = [[row[columns.index(name)] for name in shown] for row in rows]
    console.print(terminal_table(shown, kept, texts=2))
