"""Detect networks whose training has collapsed: accuracy at chance although the loss is finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from classroomkd.loss.options import LossOptions
from classroomkd.runs.recipe import Recipe

# A healthy network can take a while to rise above chance: mobilenetv2 at a learning rate of 0.01
# takes about 100 steps of 64 images. Nothing is reported before that.
_PATIENCE = 200  # steps
_WINDOW = 50  # steps whose top-1 is judged, in whole epochs
_DEVIATIONS = 3.0  # standard errors above chance up to which an accuracy counts as chance
# If one class has a larger share, healthy trainings start by always predicting it.
_MOST = 2 / 3


def most_frequent(targets: np.ndarray) -> float:
    """The share of images in the most frequent class: the top-1 of always predicting it.

    ``targets`` are their classes' indices, [N].
    """
    return float(np.bincount(targets).max() / len(targets))


def is_at_chance(
    records: Sequence[Mapping[str, Any]], *, chance: float, steps: int, images: int
) -> bool:
    """Whether the last epochs' training top-1 is no better than ``chance``.

    Args:
        records: a network's epochs so far, each with its ``train_top1``.
        chance: the share of the most frequent class.
        steps: per epoch.
        images: per epoch.

    """
    if chance > _MOST or len(records) * steps < _PATIENCE:
        return False
    last = records[-math.ceil(_WINDOW / steps) :]
    top1 = sum(record["train_top1"] for record in last) / len(last)
    error = math.sqrt(chance * (1 - chance) / (len(last) * images))
    return top1 <= chance + _DEVIATIONS * error


def remedies(recipe: Recipe, phase: str, n_classes: int, n_mentors: int) -> str:
    """Overrides to try if a network of a run is at chance."""
    section = "mentor_training" if phase == "mentor" else "training"
    tries, taught = [], phase == "student" and recipe.method == "classroom"
    if taught and recipe.loss.task_weight == "confidence":
        # A student that gives true classes no probability then has almost no loss, and is stuck.
        tries.append("loss.task_weight=1")
    tries.append(f"a lower {section}.learning_rate")
    if getattr(recipe, section).clip_norm is None:
        tries.append(f"{section}.clip_norm=1")
    if taught:
        options = LossOptions(mentor_weight=recipe.loss.mentor_weight)
        if weight := options.mentor_weight_for(n_classes, n_mentors):
            tries.append(f"loss.mentor_weight={weight / 3:.1g}")
    return f"try {' or '.join(tries)}"
