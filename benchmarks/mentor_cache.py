"""What the options of the mentor cache cost in accuracy, and what storing k logits a row would.

    python benchmarks/mentor_cache.py --data FOLDER --out OUT [--minutes M]

Trains the student of the recipe small-100 on images in class folders, with logits stored in
different ways. Seeds differ in the student's first weights only, so that the mentors run once per
way. For the k largest logits, which the library does not offer, the mentors are files made from the
cached logits. The same command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import log_softmax

from classroomkd import recipes
from classroomkd.data import Parts
from classroomkd.models.network_names import label
from classroomkd.report.markup import markdown_table
from classroomkd.report.numbers import differences, percent, spread
from classroomkd.runs.images import read_images
from classroomkd.runs.recipe import Recipe, load_recipe, split_seed
from classroomkd.runs.training_run import TrainingRun
from classroomkd.training.logits_files import logits_folder, read_key
from measure import KeptRows
from teaching import interval

SHARED = ("alone=false", "mentor_seed=0", "data.split_seed=0", "data_seed=0")
MACHINE = ("device=cpu", "threads=1", "data.loader=resident")


class Stored(NamedTuple):
    """The student's epochs, and how its mentors' logits are stored."""

    epochs: int
    dtype: str = "float32"
    repeat: int | None = None  # mentor_cache.epochs
    top: int | None = None  # the k largest; None for all

    @property
    def name(self) -> str:
        """As the table says it."""
        if self.top:
            return f"{self.top} largest"
        return self.dtype if self.repeat is None else f"`epochs: {self.repeat}`"

    def bytes_per_image(self, n_classes: int) -> int:
        """The size of a mentor's file divided by the number of images.

        Of the k largest, their classes are stored too, in one byte each up to 256, and the logits
        of the target and of all others. Every row has a hash of 4 bytes.
        """
        size = np.dtype(self.dtype).itemsize
        row = n_classes * size
        if self.top:
            row = self.top * math.ceil(math.log2(n_classes) / 8) + (self.top + 2) * size
        return min(self.repeat or self.epochs, self.epochs) * (row + 4)


SHORT, LONG, LONGEST = 5, 12, 60  # epochs: the recipe's, and what the time allows
PLAN: tuple[tuple[tuple[Stored, ...], range], ...] = (
    ((Stored(SHORT), Stored(SHORT, "float16")), range(5)),
    (tuple(Stored(SHORT, top=k) for k in (5, 10, 25)), range(3)),
    ((Stored(LONG), Stored(LONG, repeat=1), Stored(LONG, repeat=4)), range(3)),
    ((Stored(LONGEST), *(Stored(LONGEST, repeat=k) for k in (1, 10, 30))), range(3)),
)
KEYS = (*Stored._fields, "seed")


def plan() -> Iterator[dict[str, Any]]:
    """The keys of each row to measure."""
    for ways, seeds in PLAN:
        for seed, way in product(seeds, ways):
            yield way._asdict() | {"seed": seed}


def top_k(logits: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., N, C] of which the ``k`` largest and the targets' are exact.

    The remaining probability is spread evenly over the other classes. ``logits`` are [..., N, C]
    and ``targets`` [N]. Also returns the probability of each row that is exact, [..., N].
    """
    logs = log_softmax(logits.double(), -1)
    exact = torch.zeros_like(logs, dtype=torch.bool)
    exact.scatter_(-1, logs.topk(k, -1).indices, True)
    exact.scatter_(-1, targets.expand(logs.shape[:-1])[..., None], True)
    others = logs.masked_fill(exact, -math.inf).logsumexp(-1, keepdim=True)
    others = others - (~exact).sum(-1, keepdim=True).log()
    share = logs.exp().masked_fill(~exact, 0).sum(-1)
    return torch.where(exact, logs, others).float(), share


def cached(recipe: Recipe, way: Stored) -> dict[str, np.ndarray]:
    """The cached logits [epochs, N, C] of each mentor, memory-mapped.

    They are 0 for images that the last batch of an epoch, which is not full, would have had.
    """
    found = {}
    for folder in sorted(logits_folder().iterdir()):
        key = read_key(folder) or {}
        if key.get("dtype") == way.dtype and key["shape"][0] == way.epochs:
            found[key["mentor"]] = np.load(folder / "logits.npy", mmap_mode="r")
    return {label(mentor.source): found[label(mentor.source)] for mentor in recipe.mentors}


def files(recipe: Recipe, way: Stored, targets: np.ndarray, out: Path) -> dict[str, float]:
    """Write each mentor's k largest logits to ``out``/NAME.npy; returns the mean of `top_k`."""
    assert way.top
    shares = []
    for name, logits in cached(recipe, way._replace(top=None)).items():
        values, share = top_k(torch.tensor(logits), torch.from_numpy(targets), way.top)
        np.save(out / f"{name}.npy", values.numpy())
        shares.append(share.numpy()[logits.any(-1)])
    return {"exact_share": float(np.concatenate(shares).mean())}


def rounding(recipe: Recipe, way: Stored) -> dict[str, float]:
    """How far the logits cached in ``way`` are from those in float32, and how large these are."""
    exact, differing, largest = cached(recipe, way._replace(dtype="float32")), [], []
    for name, logits in cached(recipe, way).items():
        known = logits.any(-1)
        own, right = logits[known].astype(np.float32), exact[name][known]
        differing.append(np.abs(own - right).max())
        largest.append(np.abs(right).max())
    return {"largest_difference": float(max(differing)), "largest_logit": float(max(largest))}


def measure(row: Mapping[str, Any], data: Path, sets: Parts, out: Path) -> dict[str, Any]:
    """Train the student of a row, and the mentors unless they are in the store."""
    way = Stored(*(row[key] for key in Stored._fields))
    begin, recipe = time.process_time(), recipe_of(data)
    about: dict[str, float] = {}
    overrides = [f"mentor_cache.dtype={way.dtype}"]
    if way.repeat:
        overrides.append(f"mentor_cache.epochs={way.repeat}")
    if way.top:
        about = files(recipe, way, sets.train.targets, out)
        mentors = [str(out / f"{label(mentor.source)}.npy") for mentor in recipe.mentors]
        overrides = [f"mentors={json.dumps(mentors)}"]
    recipe = recipe_of(data, f"training.epochs={way.epochs}", f"seed={row['seed']}", *overrides)
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    run = TrainingRun(recipe, Console(quiet=True))
    with patch("classroomkd.runs.training_run.write_report"):  # not needed here
        summary = run.run(sets.train, sets.test, folder, validation_set=sets.validation)
    if way.dtype == "float16":
        about = rounding(recipe, way)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    counts = ("name", "classes", "train_images", "validation_images", "test_images")
    return {
        "data": {key: summary["data"][key] for key in counts},
        **about,
        "top1": last["test_top1"],
        "validation_top1": last["validation_top1"],
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def recipe_of(data: Path, *overrides: str) -> Recipe:
    """The recipe small-100 as in the committed tables, with other values."""
    source = f"data.source={json.dumps(str(data))}"
    return load_recipe(recipes.find("small-100"), [source, *SHARED, *MACHINE, *overrides])


def markdown(record: Mapping[str, Any]) -> Iterator[str]:
    """The table of a record, and what is needed to read it."""
    rows = record["rows"]
    data = rows[0]["data"]
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    yield (
        f"{data['name']} ({data['classes']} classes, {data['train_images']:,} training images): "
        f"{len(rows)} students, {minutes:.0f} minutes of one core, "
        "without training the mentors. Top-1 of the last epoch on the "
        f"{data['test_images']:,} test images, with its standard deviation over the seeds, and its "
        "difference from that with float32 and as many epochs, paired by seed, with its 95 % "
        "confidence interval by Student's t; also on the "
        f"{data['validation_images']:,} validation images. Size is that of the "
        "files, compared with float32."
    )
    groups: dict[Stored, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(Stored(*(row[key] for key in Stored._fields)), []).append(row)
    lines = []
    for way, group in sorted(groups.items(), key=lambda item: item[0].epochs):
        base = Stored(way.epochs)
        cells = [str(way.epochs), way.name]
        own, whole = (of.bytes_per_image(data["classes"]) for of in (way, base))
        cells += [f"{100 * own / whole:.0f} %", percent(spread([row["top1"] for row in group]))]
        for column in ("top1", "validation_top1"):
            found = differences(
                *({row["seed"]: row[column] for row in of} for of in (group, groups[base]))
            )
            cells.append("" if way == base else percent(interval(found), signed=True))
        lines.append([*cells, str(len(group))])
    yield markdown_table(
        ("epochs", "stored", "size", "test", "difference", "on validation images", "seeds"), lines
    )
    rounded = next((row for row in rows if "largest_difference" in row), None)
    if rounded:
        yield (
            f"The largest difference of a logit in float16 is {rounded['largest_difference']:.2g}; "
            f"the largest logit is {rounded['largest_logit']:.3g}."
        )
    shares = {row["top"]: row["exact_share"] for row in rows if row["top"]}
    if shares:
        told = ", ".join(f"{100 * share:.0f} % with k = {k}" for k, share in shares.items())
        yield f"The mean probability that is stored exactly, the target's included: {told}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a data set in class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for mentor_cache.json")
    help_minutes = "after so many, no other student is started"
    parser.add_argument("--minutes", type=float, default=math.inf, help=help_minutes)
    options = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * options.minutes
    out, data = options.out.absolute(), options.data.absolute()
    os.environ["CLASSROOMKD_CACHE"] = str(out / "cache")  # for these logits only
    recipe = recipe_of(data)
    sets = read_images(recipe.data, split_seed(recipe))
    kept = KeptRows(out, "mentor_cache", KEYS)
    missing = [row for row in plan() if not kept.has(**row)]
    for row in track(missing, "students"):
        if time.monotonic() < ends:
            kept.add(row | measure(row, data, sets, out))


if __name__ == "__main__":
    main()
