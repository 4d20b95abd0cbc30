"""Runs small enough for a test: their images, recipe and records."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from classroomkd.data import ImageSet
from classroomkd.runs.recipe import Recipe, load_recipe
from classroomkd.runs.training_run import TrainingRun

CLASSES = ["red", "green", "blue"]


def colours(count: int, seed: int = 0, size: int = 8) -> ImageSet:
    """Noise in which the channel of the class is brighter: separable, but not trivially."""
    rng = np.random.default_rng(seed)
    targets = np.arange(count) % 3
    images = rng.integers(0, 200, (count, size, size, 3))
    images[np.arange(count), :, :, targets] += 55
    return ImageSet(images.astype(np.uint8), targets.astype(np.int64), CLASSES)


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


VALUES = {
    "student": "resnet8",
    "mentors": ["resnet8", {"source": "resnet14", "epochs": 1}, {"source": "resnet8", "epochs": 1}],
    "data": {"source": "colours", "image_size": 8, "validation": 0.0, "loader": "resident"},
    "training": {"epochs": 2, "batch_size": 8},
    "mentor_training": {"epochs": 2, "batch_size": 8},
    "store": False,
    "device": "cpu",
    "threads": 1,
}


def recipe(*overrides: str) -> Recipe:
    return load_recipe(values=VALUES, overrides=overrides)


# What makes a mentor that the store keeps.
STORED = ("store=true", "mentors=[resnet8]", "training.epochs=1", "mentor_training.epochs=2")


def stored_run(out, *overrides, train_seed=0, test_seed=1):
    """The summary of a run whose mentor the store keeps, and what it printed."""
    text = io.StringIO()
    classroom = TrainingRun(recipe(*STORED, *overrides), Console(file=text, width=200))
    sets = colours(28, train_seed), colours(13, test_seed)
    return classroom.run(*sets, out), text.getvalue()


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
