"""A run's use of the cache of mentors' logits: its keys, and the size of the files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from classroomkd.data.batches import Batches
from classroomkd.data.sources import split_mask
from classroomkd.errors import UserError
from classroomkd.loss.methods import Method, method_names
from classroomkd.models.network_names import is_logits, label
from classroomkd.runs.builder import module_digest
from classroomkd.runs.context import RunContext
from classroomkd.runs.images import AnyPart, training_mixing
from classroomkd.runs.jobs import TrainingJob
from classroomkd.runs.mentor_setup import Mentor
from classroomkd.runs.recipe import Recipe, kept_epochs, split_seed, teaching
from classroomkd.training.logits_files import (
    KeptLogits,
    OwnLogits,
    key_difference,
    logits_folder,
    read_key,
    size,
    size_text,
)
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.mentor_cache import CachedMentors


@dataclass(kw_only=True)
class MentorAnswers(RunContext):
    """The logits files of a run's mentors.

    ``mentors`` are those with a network; ``own`` are files written by another program.
    """

    mentors: Sequence[Mentor]
    own: Mapping[str, OwnLogits]

    def cached(
        self,
        opened: ExitStack,
        job: TrainingJob,
        method: Method,
        bank: MentorBank,
        networks: Mapping[str, nn.Module],
    ) -> MentorBank | CachedMentors:
        """The mentors of ``job``: the ``bank`` itself if no logits come from files.

        ``networks`` are those of the bank, by name. The files are closed with ``opened``.

        Raises UserError if there is not enough space for new files.
        """
        recipe = self.recipe
        if method.uses_features:
            if recipe.mentor_cache:
                self.notify(f"method {recipe.method} compares features: its mentors are not cached")
            return bank
        sources: dict[str, KeptLogits | OwnLogits] = dict(self.own)
        if recipe.mentor_cache and networks:
            sources |= self._open(job, networks)
        if not sources:
            return bank
        cached = CachedMentors(
            names_in_order(recipe, self.mentors, self.own),
            bank if networks else None,
            sources,
            device=self.processes.device,
            dtype=self.dtype,
            cuda_graph=recipe.cuda_graph,
            notify=self.notify,
        )
        opened.callback(cached.close)
        return cached

    def _open(self, job: TrainingJob, networks: Mapping[str, nn.Module]) -> dict[str, KeptLogits]:
        """The files of the mentors by name; missing ones are created."""
        keys = {
            mentor.name: self._key(job, mentor, networks[mentor.name]) for mentor in self.mentors
        }
        folders = {name: _folder(key) for name, key in keys.items()}
        main, kept = self.processes.is_main, {}
        wanted = {folders[name]: key for name, key in keys.items()}
        problem = self._begin(wanted) if main else None
        if problem := self.processes.from_main(problem):
            raise UserError(problem)
        if main:
            kept = {name: KeptLogits(folders[name], key) for name, key in keys.items()}
            for of in kept.values():
                if of.begun_again:
                    self.notify(f"{of.folder} had a missing or truncated file: started again")
        writes = self.processes.from_main({name: of.writes for name, of in kept.items()})
        if not main:
            kept = {
                name: KeptLogits(folders[name], key, joins=writes[name])
                for name, key in keys.items()
            }
        return kept

    def _begin(self, wanted: Mapping[Path, Mapping[str, Any]]) -> str | None:
        """Print what will be written, or return the error if there is not enough space."""
        new = [folder for folder in wanted if read_key(folder) is None]
        assert self.recipe.mentor_cache is not None
        each, home = size(self._shape, self.recipe.mentor_cache.dtype), logits_folder()
        needed = len(new) * each
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free
        sizes = (
            f"{size_text(needed)} for {len(new)} of {len(wanted)} mentors, {size_text(free)} free"
        )
        if needed > free:
            return (
                f"the mentor cache in {home} needs {sizes}: set mentor_cache.dtype=float16, let "
                "the augmentation repeat by mentor_cache.epochs, or free some space (classroomkd "
                "cache)"
            )
        for folder in new:
            for other in home.glob("*/"):
                known = read_key(other) or {}
                if all(known.get(name) == wanted[folder][name] for name in ("weights", "images")):
                    differs = key_difference(other, wanted[folder])
                    self.notify(f"{other} cannot be used: {differs}")
        self.notify(
            f"mentor cache: {home}, {sizes}"
            if new
            else f"mentor cache: {home}, with rows of an earlier run for every mentor"
        )
        return None

    @property
    def _shape(self) -> tuple[int, int, int]:
        return kept_epochs(self.recipe), len(self.sets["train"]), len(self.info.classes)

    def _key(self, job: TrainingJob, mentor: Mentor, network: nn.Module) -> dict[str, Any]:
        """Everything that the mentor's logits depend on."""
        recipe = self.recipe
        assert recipe.mentor_cache is not None
        training = job.training(recipe)
        return {
            "mentor": label(mentor.architecture),
            "weights": module_digest(network),
            "code": self.builder.source_digest(mentor.architecture, network),
            "shape": list(self._shape),
            "dtype": recipe.mentor_cache.dtype,
            "images": self.digests["train"],
            "mean": list(self.info.mean),
            "std": list(self.info.std),
            "mixing": repr(training_mixing(training, len(self.info.classes))),
            "seed": job.batch_seed(recipe),
            "batch_size": training.batch_size,  # the bits depend on it
            "compile": recipe.compile,
            **self.computation(),
        }


def _folder(key: Mapping[str, Any]) -> Path:
    """The folder for logits with this key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.@+]+", "-", key["mentor"]).strip("-")
    return logits_folder() / f"{name}-{digest[:24]}"


def find_own(recipe: Recipe) -> dict[str, OwnLogits]:
    """The mentors given as logits files, by name.

    Raises UserError if a file does not hold logits, or the method needs more than logits.
    """
    found: dict[str, OwnLogits] = {}
    for config in teaching(recipe):
        if is_logits(config.source):
            if recipe.student and method_names.entry(recipe.method).uses_features:
                raise UserError(
                    f"method {recipe.method} compares features, which {config.source} does not "
                    "have: take a network as its mentor"
                )
            path = Path(config.source).expanduser()
            name, number = path.name, 1
            while name in found:
                number += 1
                name = f"{path.name}-{number}"
            found[name] = OwnLogits(path)
    return found


def names_in_order(
    recipe: Recipe, mentors: Sequence[Mentor], own: Mapping[str, OwnLogits]
) -> list[str]:
    """The names of all mentors that the method uses, networks and files, in the recipe's order."""
    networks, files = (mentor.name for mentor in mentors), iter(own)
    return [next(files if is_logits(m.source) else networks) for m in teaching(recipe)]


def fit_own(
    own: Mapping[str, OwnLogits], train_set: AnyPart, n_classes: int, recipe: Recipe, splits: bool
) -> None:
    """Match logits files written by other programs with a run's images.

    With ``splits`` the validation images are split off those of ``train_set``.

    Raises UserError if they are for other images, classes or epochs, or if the run cannot use
    logits files.
    """
    if isinstance(train_set, Batches):
        if own or recipe.mentor_cache:
            raise UserError(
                "logits files need images with a fixed index, which a DataLoader's batches lack: "
                "give a data set, or leave out mentor_cache and logits files"
            )
        return
    kept = np.arange(len(train_set))
    if recipe.data.validation and splits:
        mask = split_mask(train_set, recipe.data.validation, split_seed(recipe))
        kept = np.flatnonzero(~mask)
    for logits in own.values():
        _require_fit(logits, len(train_set), len(kept), n_classes, recipe)
        if logits.shape[1] != len(kept):
            logits.of_samples = kept


def _require_fit(
    logits: OwnLogits, n_images: int, n_kept: int, n_classes: int, recipe: Recipe
) -> None:
    epochs, count, classes = logits.shape
    if count not in (n_images, n_kept):
        split = "" if n_kept == n_images else f" or the {n_kept} left without validation"
        raise UserError(
            f"{logits.path} has logits of {count} images: give those of the {n_images} training "
            f"images{split}, in their order"
        )
    if classes != n_classes:
        raise UserError(f"{logits.path} has {classes} classes, the data has {n_classes}")
    if epochs not in (1, kept_epochs(recipe)):
        raise UserError(
            f"{logits.path} has logits of {epochs} epochs: give those of 1, or of the "
            f"{kept_epochs(recipe)} whose augmentation differs"
        )
    if epochs == 1 and (recipe.training.mixup or recipe.training.cutmix):
        raise UserError(
            f"{logits.path} has one answer an image, and mixup or cutmix mixes images: give "
            "logits for each epoch, or set both to 0"
        )
