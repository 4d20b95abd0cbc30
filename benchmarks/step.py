"""Compare the whole training step of the trainer with that of a straightforward loop.

    python benchmarks/step.py [--[no-]small] [--student NAME …] [--batch N …] [--rounds N]
                              [--seconds N] [--whole EPOCHS] [--minutes M] [--out FOLDER]

A student, a teacher and five peers with random weights run on random images of 100 classes. A round
is an epoch, loader included, or its first --seconds seconds. Every row has its own process. The
rows of one classroom and batch size are prepared together, then timed in rounds, interleaved, and
then profiled in further steps. --whole trains and evaluates whole epochs of each classroom at its
smallest batch size. With cached mentors, their logits for one augmentation of every image are kept
beforehand. What compiles comes last, without --small. Prints the tables and writes step.json after
every round. If there is a step.json from the same machine and versions, its rows for other
classrooms and batch sizes are kept. On a CPU, --small is the default; this measures the classroom
of resnet20:

    python benchmarks/step.py --no-small --student resnet20 --batch 64 --images 1024 --out FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loader_processes import ProcessRow, RowError, stop_all
from loader_rows import Setting
from loaders import PACKAGES, random_images
from measure import DEVICE, GPU, environment, write_json
from result_tables import STEP_LEGEND, terminal
from step_rows import (
    CACHED,
    EPOCHS,
    KEEPING,
    LOOP,
    MENTORS,
    NETWORKS,
    THIS,
    TRAINERS,
    RunningStep,
    StepCase,
)

CLASSROOMS = {  # a teacher and five peers
    "resnet20": ("resnet56", "resnet8", "resnet14", "shufflenetv2", "mobilenetv2", "shufflenetv1"),
    "mobilenetv2": ("resnet50", "resnet8", "resnet14", "resnet20", "shufflenetv1", "shufflenetv2"),
}
SMALL_CLASSROOMS = {"resnet8": ("resnet14", "resnet8")}
FULL = {"images": 50_000, "size": 32, "batch": [64, 256, 1024], "seconds": 5.0}
SMALL = {"images": 1024, "size": 16, "batch": [64], "seconds": 1.0}
PROJECTED_IMAGES = 50_000
COMPILED = "trainer, compiled"


class StepRow(ProcessRow):
    """One implementation, classroom and batch size."""

    def __init__(self, setting: Setting, case: StepCase, name: str, seconds: float) -> None:
        super().__init__(
            partial(RunningStep, setting, case, name, seconds),
            setting.device,
            classroom=case.classroom,
            batch=case.batch,
            implementation=name,
            images=setting.count,
            size=setting.shape[:2],
        )

    def prepare(self) -> None:
        """Make everything and take the first steps."""
        self.process.ready()
        before, held = self.process.memory(), []
        self.record |= self.process.ask("open", held)
        self.record["host_mib"] = (max(held) - before) / 2**20 if before else None

    def round(self) -> None:
        """Time one round."""
        self.record["rounds"].append(self.process.ask("round"))
        rate = statistics.median(self.record["rounds"])
        self.record |= {
            "status": "ok",
            "images_per_second": rate,
            "projected_minutes": EPOCHS * PROJECTED_IMAGES / rate / 60,
        }

    def parts(self) -> None:
        """Record the GPU memory and the breakdown of a step."""
        if self.process is None or not self.record["rounds"]:
            return
        try:
            gpu = self.process.ask("gpu_bytes")
            self.record["gpu_mib"] = None if gpu is None else gpu / 2**20
            parts = self.process.ask("parts")
        except RowError as failure:  # the row keeps its rate
            self.record["parts_status"] = str(failure)
            return
        cached = self.record["implementation"] == CACHED  # whose mentors are files
        networks = sum(parts[part] for part in NETWORKS if not (cached and part == MENTORS))
        whole = sum(parts.values())
        self.record |= {
            "parts_status": "ok",
            "parts_ms": {part: 1e3 * seconds for part, seconds in parts.items()},
            "outside_networks_percent": 100 * (1 - networks / whole),
        }

    def train_and_evaluate(self, epochs: int) -> None:
        """Time whole epochs, each with its evaluation."""
        self.record |= {"epochs": 0, "train_seconds": 0.0, "evaluation_seconds": 0.0}
        while self.record["epochs"] < epochs:
            train, evaluation = self.process.ask("train_and_evaluate")
            self.record["epochs"] += 1
            self.record["train_seconds"] += train
            self.record["evaluation_seconds"] += evaluation
        self.record["status"] = "ok"


def measure(
    rows: Sequence[StepRow], n_rounds: int, ends: float, grown: Callable[[], None] = lambda: None
) -> None:
    """Fill in the records of one classroom and batch size; ``grown`` is called as they grow."""
    if time.monotonic() > ends:
        return
    try:
        for row in rows:  # in parallel, before anything is timed
            row.start(ends)
        for row in rows:
            row.attempt(row.prepare)
        for _ in range(n_rounds):
            for row in rows:
                row.attempt(row.round)
                grown()
        for row in rows:
            row.parts()
            grown()
    finally:
        stop_all(rows)


def whole(row: StepRow, epochs: int, ends: float) -> None:
    """Fill in the record of a row that trains whole epochs."""
    if time.monotonic() > ends:
        return
    try:
        row.start(ends)
        row.attempt(row.prepare)
        row.attempt(partial(row.train_and_evaluate, epochs))
    finally:
        row.stop()


def compare(records: Sequence[dict[str, Any]]) -> None:
    """Add to each row its speed relative to the loop of the same classroom and batch size."""
    key = ("classroom", "batch")
    loops = {
        tuple(record[k] for k in key): record["images_per_second"]
        for record in records
        if record["implementation"] == LOOP and record["status"] == "ok"
    }
    for record in records:
        loop = loops.get(tuple(record[k] for k in key))
        if record["status"] == "ok":
            record["times_the_loop"] = record["images_per_second"] / loop if loop else None


def implementations() -> list[str]:
    """The implementations that this machine runs, except those that compile for minutes."""
    if not GPU:
        return [THIS, CACHED, KEEPING, LOOP]
    without_ffcv = importlib.util.find_spec("ffcv") is None
    left_out = {COMPILED, KEEPING} | ({"trainer, resident loader"} if without_ffcv else set())
    return [name for name in (*TRAINERS, LOOP) if name not in left_out]


def run(arguments: argparse.Namespace, setting: Setting, report: Callable[[dict], None]) -> dict:
    """Measure all rows; ``report`` is called with the record as it grows."""
    ends = time.monotonic() + 0.95 * 60 * arguments.minutes
    classrooms = SMALL_CLASSROOMS if arguments.small else CLASSROOMS
    cases = [
        StepCase(student, mentors, batch)
        for student, mentors in classrooms.items()
        for batch in arguments.batch
        if student in (arguments.student or classrooms)
    ]
    record = {
        "benchmark": "step",
        "environment": environment(*PACKAGES),
        "workers": setting.workers,
        "seconds_a_round": arguments.seconds,
        "rows": [],
        "whole": [],
    }

    def rows(case: StepCase, names: Sequence[str]) -> None:
        def grown() -> None:
            compare(record["rows"])
            report(record)

        these = [StepRow(setting, case, name, arguments.seconds) for name in names]
        record["rows"] += [row.record for row in these]
        measure(these, arguments.rounds, ends, grown)
        about = [(row.record["implementation"], row.record["status"]) for row in these]
        print(case.classroom, case.batch, *about, file=sys.stderr, flush=True)
        grown()

    for case in cases:
        rows(case, implementations())
        if arguments.whole and case.batch == min(arguments.batch):
            row = StepRow(setting, case, THIS, arguments.seconds)
            record["whole"].append(row.record)
            whole(row, arguments.whole, ends)
            report(record)
    for case in () if arguments.small else cases:  # last, because it compiles for minutes
        rows(case, [COMPILED])
    return record


def kept_rows(out: Path, record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows in the step.json of ``out`` that ``record``, of the same machine, is not about."""
    kept: dict[str, list[dict[str, Any]]] = {"rows": [], "whole": []}
    path = out / "step.json"
    if not path.exists():
        return kept
    earlier = json.loads(path.read_text(encoding="utf-8"))
    passing = {"date", "load_average"}
    then, now = (
        {key: value for key, value in of["environment"].items() if key not in passing}
        for of in (earlier, record)
    )
    if then != now:
        return kept
    measured = {(row["classroom"], row["batch"]) for row in record["rows"]}
    return {
        kind: [row for row in earlier[kind] if (row["classroom"], row["batch"]) not in measured]
        for kind in kept
    }


def main() -> int:
    """Run the benchmark; return 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    small = argparse.BooleanOptionalAction
    add("--small", action=small, default=not GPU, help="one small classroom (default on a CPU)")
    add("--images", type=int, help="number of images (50000; small: 1024)")
    add("--size", type=int, help="height and width (32; small: 16)")
    add("--student", nargs="+", help="only the classrooms of these students")
    add("--batch", type=int, nargs="+", help="images per batch (64 256 1024; small: 64)")
    add("--rounds", type=int, default=2, help="(%(default)s)")
    add("--seconds", type=float, help="longest round (5; small: 1)")
    add("--workers", type=int, default=cores, help="of the loop (one per core: %(default)s)")
    add("--whole", type=int, default=0, metavar="EPOCHS", help="whole epochs to train and evaluate")
    add("--minutes", type=float, default=math.inf, help="time limit")
    add("--out", type=Path, help="folder for step.json")
    arguments = parser.parse_args()
    for name, value in (SMALL if arguments.small else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if max(arguments.batch) > arguments.images:
        parser.error(f"a batch of {max(arguments.batch)} needs more than {arguments.images} images")

    def report(record: dict[str, Any]) -> None:
        if arguments.out:
            kept = kept_rows(arguments.out, record)
            write_json(
                arguments.out, "step", record | {kind: kept[kind] + record[kind] for kind in kept}
            )

    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        os.environ["CLASSROOMKD_CACHE"] = f"{folder}/cache"  # for FFCV's files
        image_set = random_images(arguments.images, arguments.size)
        setting = Setting.of(Path(folder), image_set, 1, arguments.workers, DEVICE)
        record = run(arguments, setting, report)
    print(terminal(record), record["environment"], STEP_LEGEND, sep="\n")
    records = record["rows"] + record["whole"]
    statuses = [record.get(key, "") for record in records for key in ("status", "parts_status")]
    return int(any("failed" in status for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
