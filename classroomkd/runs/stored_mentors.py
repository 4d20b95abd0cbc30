"""A run's use of the mentor store: the keys of mentors, and locks against training one twice."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from classroomkd.models import NetworkInfo, network_names
from classroomkd.report.records import label
from classroomkd.runs.context import RunContext
from classroomkd.runs.identity import mentor_values
from classroomkd.runs.jobs import TrainingJob
from classroomkd.runs.mentor_setup import weights_digest
from classroomkd.runs.store import MentorStore


@dataclass(kw_only=True)
class StoredMentors(RunContext):
    """The mentors of a run in the ``store``; students are never stored."""

    store: MentorStore

    def claim(self, job: TrainingJob) -> AbstractContextManager[None]:
        """A context that excludes other processes from training the same mentor for the store."""
        key = self._store_key(job)
        if key is None or self.processes.together:  # these must not wait for each other
            return nullcontext()
        return self.store.claim(key, self.notify, self.interrupts)

    def find(self, job: TrainingJob) -> tuple[nn.Module, NetworkInfo, dict[str, Any]] | None:
        """The stored mentor, as `MentorStore.find` returns it, the same in all processes."""
        key = self._store_key(job)
        found = None
        if key and self.processes.is_main:  # other processes may have separate caches
            found = self.store.find(key, self.notify)
        return self.processes.from_main(found)

    def add(
        self, job: TrainingJob, network: nn.Module, info: NetworkInfo, done: Mapping[str, Any]
    ) -> None:
        """Store a trained mentor; a failure is only reported."""
        key = self._store_key(job)
        if key and self.processes.is_main:
            try:
                self.store.add(key, network, info, done)
            except OSError as error:
                self.notify(f"{label(job.phase, job.name)} is not stored: {error}")

    def _store_key(self, job: TrainingJob) -> dict[str, Any] | None:
        """Everything that determines a mentor's training, or None if the store is not used."""
        given = job.architecture in self.builder.modules
        if job.phase != "mentor" or given or not self.recipe.store:
            return None
        key = {
            **mentor_values(self.recipe),
            **self.computation(),
            "architecture": network_names.label(job.architecture),
            "training": job.training(self.recipe).deciding(),
            "epoch": job.last,
            "images": dict(self.digests),
            "classes": self.info.classes,
            "mean": job.mean or self.info.mean,
            "std": job.std or self.info.std,
            "seed": job.seed(self.recipe),
        }
        if (code := self.builder.code(job.architecture)) is not None:
            key["code"] = code
        if job.weights is not None:
            key["first_weights"] = weights_digest(job.weights)
        return key
