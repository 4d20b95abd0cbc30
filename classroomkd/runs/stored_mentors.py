"""A run's use of the mentor store: what a mentor is kept under, and who trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from classroomkd.models import NetworkInfo, network_names
from classroomkd.report import label
from classroomkd.runs.builder import Builder
from classroomkd.runs.identity import mentor_values
from classroomkd.runs.images import training_augmentation
from classroomkd.runs.interrupts import Interrupts
from classroomkd.runs.jobs import TrainingJob
from classroomkd.runs.machine import versions
from classroomkd.runs.mentor_setup import weights_digest
from classroomkd.runs.recipe import Recipe
from classroomkd.runs.store import MentorStore
from classroomkd.training.distributed import Processes


@dataclass(kw_only=True)
class StoredMentors:
    """The mentors of a run that ``store`` keeps; students are never kept.

    ``info`` is of any network of the run, ``digests`` are of its parts of images, ``backend`` is
    the loader's, and ``notify`` takes lines for the user.
    """

    store: MentorStore
    recipe: Recipe
    info: NetworkInfo
    builder: Builder
    digests: Mapping[str, str]
    backend: str
    dtype: torch.dtype
    processes: Processes
    interrupts: Interrupts
    notify: Callable[[str], None]

    def claim(self, job: TrainingJob) -> AbstractContextManager[None]:
        """A context in which no other process trains the same mentor for the store."""
        key = self._store_key(job)
        if key is None or self.processes.together:  # those must not wait for one another
            return nullcontext()
        return self.store.claim(key, self.notify, self.interrupts)

    def find(self, job: TrainingJob) -> tuple[nn.Module, NetworkInfo, dict[str, Any]] | None:
        """The mentor as it was trained before, as `MentorStore.find` gives it, in all processes."""
        key = self._store_key(job)
        found = None
        if key and self.processes.is_main:  # others may have a cache of their own
            found = self.store.find(key, self.notify)
        return self.processes.from_main(found)

    def add(
        self, job: TrainingJob, network: nn.Module, info: NetworkInfo, done: Mapping[str, Any]
    ) -> None:
        """Keep a trained mentor; where that fails, the user is told and nothing else happens."""
        key = self._store_key(job)
        if key and self.processes.is_main:
            try:
                self.store.add(key, network, info, done)
            except OSError as error:
                self.notify(f"{label(job.phase, job.name)} is not kept in the store: {error}")

    def _store_key(self, job: TrainingJob) -> dict[str, Any] | None:
        """All that determines a mentor's training, or None where the store is not used."""
        given = job.architecture in self.builder.modules
        if job.phase != "mentor" or given or not self.recipe.store:
            return None
        data, device = self.recipe.data, self.processes.device
        return {
            **mentor_values(self.recipe),
            "architecture": network_names.label(job.architecture),
            **_beginning(job, self.builder.code(job.architecture)),
            "training": job.training(self.recipe).deciding(),
            "epoch": job.last,
            "images": dict(self.digests),
            "classes": self.info.classes,
            "image_size": data.image_size,
            "augmentation": repr(training_augmentation(data)),
            # Each loader resizes photographs in its own way.
            "loader": self.backend if data.crop == "resize" else None,
            "mean": job.mean or self.info.mean,
            "std": job.std or self.info.std,
            "seed": job.seed(self.recipe),
            "precision": str(self.dtype),
            "processes": self.processes.world_size,
            "device": device.type,
            "threads": self.recipe.threads if device.type == "cpu" else None,
            "versions": versions(),
        }


def _beginning(job: TrainingJob, code: str | None) -> dict[str, str]:
    """What its training begins with, where that is not a name's network with random weights."""
    beginning = {} if code is None else {"code": code}
    if job.weights is not None:
        beginning["first_weights"] = weights_digest(job.weights)
    return beginning
