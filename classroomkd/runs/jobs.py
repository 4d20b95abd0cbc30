"""The role of a network in a run, its training, and its entry in the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from classroomkd.models import network_names
from classroomkd.runs.recipe import Recipe, mentor_seed
from classroomkd.training.config import TrainingConfig
from classroomkd.training.evaluation import Evaluation


@dataclass(frozen=True)
class TrainingJob:
    """The role of a network in the run.

    ``phase`` is "mentor", "alone" (the student without mentors) or "student" (taught by the
    recipe's method). ``epochs`` is the length of its schedule, None if it is not trained here;
    ``at`` is the epoch whose weights are used, None for the last. ``number`` counts networks with
    the same architecture and ``at``. ``weights`` are its initial weights, random if None. ``mean``
    and ``std`` normalise its images; if None, those of the run do.
    """

    phase: str
    name: str
    architecture: str
    epochs: int | None = None
    at: int | None = None
    number: int = 0
    weights: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    @property
    def last(self) -> int:
        """The last epoch that is trained, if it is trained here."""
        assert self.epochs is not None
        return self.at or self.epochs

    def training(self, recipe: Recipe) -> TrainingConfig:
        """How the network is trained in a run of ``recipe``."""
        if self.phase == "mentor":
            assert self.epochs is not None
            return replace(recipe.mentor_training, epochs=self.epochs)
        return recipe.training

    def seed(self, recipe: Recipe) -> int:
        """The seed of its initial weights, and usually of its batches, in a run of ``recipe``."""
        # Mentors are counted from 1, so that a mentor has the same seed in every run that uses it.
        seed = mentor_seed(recipe) if self.phase == "mentor" else recipe.seed
        name = network_names.label(self.architecture)
        entropy = np.random.SeedSequence((seed, self.number, *name.encode()))
        return int(entropy.generate_state(1)[0])

    def batch_seed(self, recipe: Recipe) -> int:
        """The seed of its batches and their augmentation in a run of ``recipe``."""
        shared = None if self.phase == "mentor" else recipe.data_seed
        return self.seed(recipe) if shared is None else shared

    def repeat(self, recipe: Recipe) -> int | None:
        """The number of epochs after which its augmentation repeats; None if it never does."""
        cached = None if self.phase == "mentor" else recipe.mentor_cache
        return cached.epochs if cached else None

    def result(self, network: nn.Module, measured: Evaluation) -> dict[str, Any]:
        """The network's entry in summary.json."""
        return {
            "phase": self.phase,
            "name": self.name,
            "architecture": network_names.label(self.architecture),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "top1": measured.top1,
            "top5": measured.top5,
            "loss": measured.loss,
            "calibration_error": measured.calibration_error,
            "per_class": measured.per_class,
            "trained": self.epochs is not None,
            "epochs": None if self.epochs is None else self.last,
        }


def student_jobs(recipe: Recipe) -> list[TrainingJob]:
    """The trainings of the student, in order: alone, and by the recipe's method."""
    if not recipe.student:
        return []
    phases = ["alone"] if recipe.alone or recipe.method == "alone" else []
    if recipe.method != "alone":
        phases.append("student")
    name, epochs = network_names.label(recipe.student), recipe.training.epochs
    return [
        TrainingJob(phase, name, recipe.student, epochs, weights=recipe.init) for phase in phases
    ]


def best(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The accuracy of epochs selected afterwards, for the summary.

    ``best_test_top1`` is the highest top-1 on the held-out images, selected on the same images, as
    papers print it. With validation images, ``chosen_epoch`` is the best epoch on these, and
    ``chosen_top1`` its top-1 on the held-out images.
    """
    kept = {"best_test_top1": max(record["test_top1"] for record in records)}
    if "validation_top1" in records[0]:
        chosen = max(records, key=lambda record: record["validation_top1"])
        kept |= {"chosen_epoch": chosen["epoch"], "chosen_top1": chosen["test_top1"]}
    return kept
