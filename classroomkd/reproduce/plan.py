"""The tasks of a table: students, the mentors that they need, and the work of each."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from classroomkd import recipes
from classroomkd.errors import UserError
from classroomkd.loss import methods
from classroomkd.models.network_names import SIZES, code_digest, is_checkpoint, is_code, label
from classroomkd.reproduce.tables import TABLES, Table, Variant, mentors_override
from classroomkd.runs.identity import difference, mentor_values, values_without
from classroomkd.runs.recipe import (
    MentorConfig,
    Recipe,
    code_sources,
    is_given,
    load_recipe,
    mentor_seed,
    result_values,
    teaching,
    with_absolute_paths,
)

# All seeds share the mentors and the held-out images.
_SHARED = ("mentor_seed=0", "data.split_seed=0", "alone=false")
DECIDED = {"seed": "--seeds", "method": "--methods", "alone": "--methods", "device": "--devices"}


@dataclass(frozen=True, eq=False)
class Task:
    """One subprocess that trains a student, or mentors for the store.

    ``id`` is the run folder within the table's. ``arguments`` are those of ``classroomkd``, and
    ``recipe`` is their result. ``epochs`` is the number of epochs it trains, ``work`` their
    floating-point operations per training image, and ``needs`` the ids of tasks to run before.
    ``saved`` are operations that the mentor cache spares it, and ``kept`` the epochs that it adds
    to the cache, of all its mentors together.
    """

    id: str
    arguments: tuple[str, ...]
    recipe: Recipe
    epochs: int
    work: float
    needs: tuple[str, ...] = ()
    saved: float = 0.0
    kept: int = 0


@dataclass(frozen=True)
class Plan:
    """The runs of a table, the first seed first, and the mentors that they need."""

    runs: list[Task]
    mentors: list[Task]

    def shard(self, number: int, count: int) -> Plan:
        """The ``number``-th, from 1, of ``count`` parts with about equal work, and its mentors.

        Runs of one classroom stay together where possible, so that few mentors are needed by
        several shards. The result depends only on the plan, not on what has been run.
        """
        ordered = sorted(self.runs, key=lambda run: run.id)
        ends = list(accumulate(run.work for run in ordered))
        # A run belongs to the shard that contains its middle.
        places = {
            run.id: int(count * (end - run.work / 2) / ends[-1])
            for run, end in zip(ordered, ends, strict=True)
        }
        runs = [run for run in self.runs if places[run.id] == number - 1]
        needed = {need for run in runs for need in run.needs}
        return Plan(runs, [task for task in self.mentors if task.id in needed])


def make_plan(
    table: str,
    *,
    data: Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    classrooms: Sequence[str] = (),
    method_names: Sequence[str] = (),
    mentor_cache: str | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """All tasks of ``table``.

    Args:
        table: one of `TABLES`.
        data: ``data.source`` for all recipes; by default their own.
        seeds: the seeds of the students.
        epochs: the students' epochs; the mentors' are scaled accordingly.
        classrooms: recipes, by name or file, instead of the table's rows.
        method_names: variants of the table, or methods, instead of all its variants.
        mentor_cache: the dtype of mentors' logits that are kept for all runs, which then share
            their batches too; None changes neither.
        overrides: overrides of every recipe.

    Raises UserError for an unknown name, a duplicate, or an override of what the plan sets.
    """
    for item in overrides:
        if (key := item.partition("=")[0]) in DECIDED:
            raise UserError(
                f"leave out the override {item!r}: use the option {DECIDED[key]} instead"
            )
    for option, values in (("--seeds", seeds), ("--classrooms", classrooms)):
        if len(set(values)) < len(values):
            raise UserError(f"{option} has a duplicate: {' '.join(map(str, values))}")
    shared = list(_SHARED)
    if data is not None:
        shared.append(f"data.source={json.dumps(str(data))}")
    if mentor_cache is not None:
        shared += [f"mentor_cache.dtype={mentor_cache}", "data_seed=0"]
    rows = _rows(TABLES[table], classrooms, shared, epochs, overrides)
    runs: list[Task] = []
    wanted: dict[str, list[tuple[Task, list[MentorConfig]]]] = {}  # by the mentors' trainings
    of_a_seed = _runs_of_a_seed(rows, method_names)
    for seed in seeds:
        for name, arguments, recipe in of_a_seed:
            recipe = replace(recipe, seed=seed)
            groups = _groups(recipe)
            run = Task(
                f"{name}/seed{seed}",
                (*arguments, f"seed={seed}"),
                recipe,
                recipe.training.epochs,
                _work(recipe),
                tuple(groups),
            )
            runs.append(run)
            for group, mentors in groups.items():
                wanted.setdefault(group, []).append((run, mentors))
    from classroomkd.reproduce.sharing import with_cached_mentors  # which reads this module

    return Plan(with_cached_mentors(runs), _mentor_tasks(wanted))


def _runs_of_a_seed(
    rows: Sequence[_Row], wanted: Sequence[str]
) -> list[tuple[str, tuple[str, ...], Recipe]]:
    """Name, arguments and recipe of the runs with one seed: of ``wanted`` variants, or of all."""
    known = {name: variant for row in rows for name, variant in row.variants.items()}
    chosen = _chosen(wanted, known)
    runs = []
    for row in rows:
        for variant in chosen or row.variants.values():
            if variant.name in row.variants or variant.name not in known:  # else of another row
                variant = row.variants.get(variant.name, variant)
                settled = _settled(row.classroom, row.overrides, variant)
                runs.append((f"runs/{row.name}/{variant.name}", *settled))
    return runs


def mentors_plan(recipe: Recipe, file: Path) -> Plan:
    """A task for each network among the mentors of ``recipe``, which is stored in ``file``."""
    run = Task("", ("mentors", "--recipe", str(file)), recipe, 0, 0.0)
    return Plan([], _mentor_tasks({group: [(run, of)] for group, of in _groups(recipe).items()}))


class _Row(NamedTuple):
    """A row of a table: its name, recipe, overrides common to its runs, and variants by name."""

    name: str
    classroom: str
    overrides: list[str]
    variants: dict[str, Variant]


def _rows(
    table: Table,
    classrooms: Sequence[str],
    shared: Sequence[str],
    epochs: int | None,
    overrides: Sequence[str],
) -> list[_Row]:
    """The rows of a table, or of the ``classrooms``; UserError for what is no classroom."""
    rows: list[_Row] = []
    for classroom in classrooms or table.rows:
        file = recipes.find(classroom)
        name = classroom if classroom in recipes.names() else file.stem
        if any(name == row.name for row in rows):
            raise UserError(f"two classrooms are called {name}: rename one of the files")
        common = [*shared, *_epochs(load_recipe(file), epochs), *overrides]
        recipe = load_recipe(file, common)
        if not recipe.student or not recipe.mentors:
            raise UserError(f"{file} is not a classroom: it needs a student and mentors")
        variants = {variant.name: variant for variant in table.variants(name, recipe)}
        rows.append(_Row(name, classroom, common, variants))
    return rows


def _chosen(wanted: Sequence[str], known: dict[str, Variant]) -> list[Variant]:
    """The variants with these names, or else the methods."""
    for name in wanted:
        if name not in known and name not in methods.names():
            raise UserError(
                f"no variant or method is called {name!r}; the table's variants are "
                f"{', '.join(known)}; the methods are {', '.join(methods.names())}"
            )
    return [known.get(name) or Variant(name, name) for name in dict.fromkeys(wanted)]


def _epochs(recipe: Recipe, epochs: int | None) -> list[str]:
    """The overrides that scale all schedules of a recipe by the same factor."""
    if epochs is None:
        return []
    factor = epochs / recipe.training.epochs

    def scaled(number: int | None) -> int | None:
        return None if number is None else max(round(number * factor), 1)

    mentors = [
        replace(mentor, epochs=scaled(mentor.epochs), at=scaled(mentor.at))
        for mentor in recipe.mentors
    ]
    result = [
        f"training.epochs={epochs}",
        f"training.warmup_epochs={recipe.training.warmup_epochs * factor}",
        f"mentor_training.epochs={scaled(recipe.mentor_training.epochs)}",
        f"mentor_training.warmup_epochs={recipe.mentor_training.warmup_epochs * factor}",
    ]
    return result + ([mentors_override(mentors)] if mentors != recipe.mentors else [])


def _settled(classroom: str, common: list[str], variant: Variant) -> tuple[tuple[str, ...], Recipe]:
    """The arguments for a variant of a classroom, without the seed, and its recipe."""
    overrides = [*common, *variant.overrides, f"method={variant.method}"]
    if variant.method != "classroom":  # other methods do not have the options of the loss
        overrides = [item for item in overrides if not item.startswith(("loss.", "loss="))]
    recipe = load_recipe(recipes.find(classroom), overrides)
    return ("train", "--recipe", classroom, *overrides), recipe


def _work(recipe: Recipe) -> float:
    size = recipe.data.image_size
    step = 3 * forward_flops(recipe.student, size)  # backward takes twice as many
    step += sum(forward_flops(mentor.source, size) for mentor in teaching(recipe))
    return step * recipe.training.epochs


def _groups(recipe: Recipe) -> dict[str, list[MentorConfig]]:
    """The mentors that must be trained for a run, grouped by the id of the task that does so."""
    groups: dict[str, list[MentorConfig]] = {}
    for mentor in teaching(recipe):
        if is_given(mentor):
            continue
        values = [
            mentor.source,
            mentor_seed(recipe),
            values_without(recipe.data, "machine"),
            recipe.mentor_training.deciding(),
            *mentor_values(recipe).values(),
        ]
        own = [mentor.weights, mentor.mean, mentor.std]
        if is_code(mentor.source):
            own.append(code_digest(mentor.source))
        values += own if any(own) else []
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w.@+]+", "-", label(mentor.source)).strip("-")
        groups.setdefault(f"mentors/{name}-{digest[:8]}", []).append(mentor)
    return groups


def _mentor_tasks(wanted: Mapping[str, list[tuple[Task, list[MentorConfig]]]]) -> list[Task]:
    """A task per training of mentors, the longest first, for the runs that need them."""
    tasks = [_mentor_task(group, runs) for group, runs in wanted.items()]
    return sorted(tasks, key=lambda task: (-task.work, task.id))


def _mentor_task(group: str, wanted: list[tuple[Task, list[MentorConfig]]]) -> Task:
    """The task that trains all mentors of one network that any run needs."""
    most: Counter[str] = Counter()
    for _, mentors in wanted:
        most |= Counter(json.dumps(asdict(mentor)) for mentor in mentors)
    mentors = [MentorConfig(**json.loads(values)) for values in most.elements()]
    run = wanted[0][0]
    rest = [item for item in run.arguments[1:] if not item.startswith("mentors=")]
    recipe = replace(run.recipe, mentors=mentors, student="", method="classroom")
    size, usual = recipe.data.image_size, recipe.mentor_training.epochs
    # Several mentors of the same network are separate trainings; its epochs come from one training.
    lasts: dict[int, int] = {}
    for values, count in most.items():
        mentor = MentorConfig(**json.loads(values))
        for number in range(count):
            lasts[number] = max(lasts.get(number, 0), mentor.at or mentor.epochs or usual)
    epochs = sum(lasts.values())
    return Task(
        group,
        ("mentors", *rest, mentors_override(mentors)),
        recipe,
        epochs,
        3 * epochs * forward_flops(mentors[0].source, size),
    )


@cache
def forward_flops(network: str, image_size: int) -> float:
    """Floating-point operations of a forward pass of one image; 0 for a checkpoint file.

    For networks of the zoo they are scaled by the image's area from those at 32×32 pixels, without
    building the network. The error is below 6 % at 16×16 pixels and below 2 % from 48×48 on.
    """
    if network in SIZES:
        return SIZES[network].flops * (image_size / 32) ** 2
    if is_checkpoint(network):
        return 0.0
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from classroomkd.models import create

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        create(network).eval()(torch.empty(1, 3, image_size, image_size))
    return float(counter.get_total_flops())


def require_same_recipe(task: Task, folder: Path) -> None:
    """Raise UserError if the run in ``folder`` was started with other values than ``task`` has."""
    differing = difference(
        result_values(load_recipe(folder / "config.yaml", of_run=True)), result_values(task.recipe)
    )
    if differing:
        raise UserError(
            f"{folder} was started with {differing} now: use the same options and recipe, or give "
            "--out a new folder"
        )
    _require_same_code(task.recipe, folder)


def _require_same_code(recipe: Recipe, folder: Path) -> None:
    """Raise UserError if a user-defined network has changed since the run in ``folder`` started."""
    inputs: dict[str, str] = {}
    with suppress(OSError, ValueError):
        inputs = json.loads((folder / "inputs.json").read_bytes())
    for source in code_sources(with_absolute_paths(recipe)):
        if inputs.get(source, digest := code_digest(source)) != digest:
            raise UserError(
                f"{source} has changed since {folder} was started: give --out a new folder"
            )


def run_values(folder: Path) -> dict:
    """The values that determine the results of the run in ``folder``, except its seed."""
    values = result_values(load_recipe(folder / "config.yaml", of_run=True))
    del values["seed"]
    return values
