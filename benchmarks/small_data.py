"""Which mentor weight `classroomkd train` should use on small data.

    python benchmarks/small_data.py --out OUT [--photos FOLDER]

Trains students of the zoo with the defaults of `train`: alone, with KD, and in classrooms that
differ only in their weights. The data are scikit-learn's digits, drawn images and, if FOLDER is a
data set of photographs in class folders, its first 10 and 20 classes. Mentors are trained once per
set and come from the mentor store for all students. Select weights by the validation images, and
report the test images. The same command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.progress import track

from classroomkd.data import ImageFiles, ImageSet, Parts, decode, digits, list_source
from classroomkd.data.image_sets import select
from classroomkd.runs.recipe import load_recipe
from classroomkd.runs.training_run import TrainingRun
from drawn import drawn
from measure import KeptRows

SEEDS = range(5)
SIZE = 16
EPOCHS = 12
MENTORS = ("resnet20", "resnet8")
VALIDATION, TEST = 200, 400  # images in all, at most 20 and 40 per class
# Set, images per class and student, the most informative first.
CELLS = (
    ("drawn 5", 40, "resnet8"),
    ("digits", 40, "resnet8"),
    ("photos 10", 40, "resnet8"),
    ("drawn 5", 40, "mobilenetv2"),
    ("drawn 20", 40, "resnet8"),
    ("photos 20", 40, "resnet8"),
    ("digits", 40, "mobilenetv2"),
    ("photos 10", 40, "mobilenetv2"),
    ("digits", 90, "resnet8"),
    ("photos 10", 150, "resnet8"),
    ("drawn 5", 150, "resnet8"),
    ("drawn 20", 40, "mobilenetv2"),
    ("drawn 20", 150, "resnet8"),
    ("photos 20", 150, "resnet8"),
    ("photos 20", 40, "mobilenetv2"),
)
# Method and, for classrooms, the total mentor weight and the task weight: the paper's, and "auto"
# with the full cross-entropy. Then other combinations that were tried.
CANDIDATES = (
    ("alone", None, None),
    ("classroom", float(len(MENTORS)), "confidence"),
    ("classroom", 0.5, 1.0),
)
EXPLORED = (("classroom", 0.5, "confidence"), ("classroom", 1.0, 1.0), ("kd", None, None))
KEYS = ("set", "images_per_class", "student", "method", "mentor_weight", "task_weight", "seed")


@cache
def whole(name: str, photos: Path | None) -> tuple[ImageSet, ImageSet]:
    """All images of a set: those for training and validation, and those for testing."""
    if name == "digits":
        return digits()
    kind, number = name.split()
    n_classes = int(number)
    if kind == "drawn":
        images, targets = drawn(n_classes, 250, SIZE)
        classes = [f"class {c:02}" for c in range(n_classes)]
        test = np.arange(len(images)) >= n_classes * (250 - 40)  # classes alternate
        return tuple(ImageSet(images[part], targets[part], classes) for part in (~test, test))
    parts = []
    for files in list_source(photos):
        kept = select(files, files.targets < n_classes)
        parts.append(ImageFiles(kept.files, kept.targets, files.classes[:n_classes]))
    decoded = decode(Parts(*parts), SIZE)
    return decoded.train, decoded.test


def sets(name: str, per_class: int, photos: Path | None) -> tuple[ImageSet, ImageSet, ImageSet]:
    """``per_class`` training images of each class, the validation images and the test images."""
    train, test = whole(name, photos)
    held_out = min(20, VALIDATION // len(train.classes))
    place = np.empty(len(train), np.int64)  # of each image within its class
    place_of_test = np.empty(len(test), np.int64)
    for places, images in ((place, train), (place_of_test, test)):
        for c in range(len(images.classes)):
            members = np.flatnonzero(images.targets == c)
            places[members] = np.arange(len(members))
    return (
        select(train, (place >= held_out) & (place < held_out + per_class)),
        select(train, place < held_out),
        select(test, place_of_test < min(40, TEST // len(train.classes))),
    )


def plan(photos: Path | None) -> Iterator[dict[str, object]]:
    """The keys of each row to measure."""
    for candidates in (CANDIDATES, EXPLORED):
        for name, per_class, student in CELLS:
            if name.startswith("photos") and photos is None:
                continue
            for method, total, task_weight in candidates:
                weight = None if total is None else total / len(MENTORS)
                for seed in SEEDS:
                    values = (name, per_class, student, method, weight, task_weight, seed)
                    yield dict(zip(KEYS, values, strict=True))


def measure(row: dict[str, object], photos: Path | None, out: Path) -> dict[str, object]:
    """Train the student of a row, and its mentors unless they are in the store."""
    train, validation, test = sets(row["set"], row["images_per_class"], photos)
    loss = {key: row[key] for key in ("mentor_weight", "task_weight")}
    recipe = load_recipe(
        values={
            "student": row["student"],
            "mentors": list(MENTORS),
            "method": row["method"],
            "alone": False,
            "data": {
                "source": row["set"] if row["set"] == "digits" else "",
                "image_size": SIZE,
                "loader": "resident",
            },
            "training": {"epochs": EPOCHS},
            **({"loss": loss} if row["method"] == "classroom" else {}),
            "seed": row["seed"],
            "mentor_seed": 0,
            "device": "cpu",
            "threads": 1,
            "checkpoint_epochs": EPOCHS,
        }
    )
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    classroom = TrainingRun(recipe, Console(quiet=True))
    with patch("classroomkd.runs.training_run.write_report"):  # not needed here
        summary = classroom.run(train, test, folder, validation_set=validation)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    *_, last = (line for line in lines if line["phase"] in ("alone", "student"))
    return {
        "classes": len(train.classes),
        "mentors_top1": [
            round(result["top1"], 4) for result in summary["results"] if result["phase"] == "mentor"
        ],
        "train_top1": last.get("train_top1"),
        "validation_top1": round(last["validation_top1"], 4),
        "top1": round(last["test_top1"], 4),
    }


def main() -> None:
    """Measure the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for small_data.json")
    parser.add_argument("--photos", type=Path, help="a data set in class folders")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    os.environ.setdefault("CLASSROOMKD_CACHE", str(out / "cache"))
    kept = KeptRows(out, "small_data", KEYS)
    missing = [row for row in plan(arguments.photos) if not kept.has(**row)]
    for row in track(missing, "students"):
        kept.add(row | measure(row, arguments.photos, out))


if __name__ == "__main__":
    main()
