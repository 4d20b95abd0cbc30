"""A whole run: the mentors, the student alone and in their classroom, the report."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from classroomkd.data import ImageFiles, ImageSet, channel_statistics, split_off
from classroomkd.errors import UserError
from classroomkd.loss.methods import Method, create
from classroomkd.models import NetworkInfo, is_external, student_file
from classroomkd.models.catalogue import is_checkpoint, split_entry
from classroomkd.models.stages import feature_shapes
from classroomkd.report import write_report
from classroomkd.runs.images import open_loaders
from classroomkd.runs.interrupts import Interrupts
from classroomkd.runs.jobs import TrainingJob
from classroomkd.runs.machine import (
    device_name,
    find_device,
    find_precision,
    start,
    versions,
)
from classroomkd.runs.mentors import (
    Mentor,
    check_trainable,
    find_mentors,
    fit_to_data,
)
from classroomkd.runs.networks import NetworkTrainer
from classroomkd.runs.progress import TrainingProgress
from classroomkd.runs.recipe import Recipe, split_seed, teaching, to_dict, with_absolute_path
from classroomkd.runs.run_folder import RunFolder
from classroomkd.runs.store import MentorStore
from classroomkd.training.distributed import Processes, local_device
from classroomkd.training.evaluation import Lessons, evaluation_loader, require_finite
from classroomkd.training.mentor_bank import MentorBank


class TrainingRun:
    """A student and its mentors.

    Building it checks all that can be wrong without the data, and raises UserError: names,
    checkpoints, the device, the sizes of images and batches.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.device = local_device(find_device(recipe.device))
        self.processes = Processes(self.device)
        recipe = replace(
            recipe,
            mentors=[with_absolute_path(mentor) for mentor in recipe.mentors],
            device=self.device.type if self.processes.together else str(self.device),
            threads=recipe.threads or torch.get_num_threads(),
        )
        torch.set_num_threads(recipe.threads)
        torch.backends.cudnn.benchmark = True  # batches have one shape: the search pays
        self.recipe = recipe
        self.console = console if self.processes.is_main else Console(quiet=True)
        self.dtype = find_precision(recipe.precision, self.device)
        self._store = MentorStore()
        epochs = recipe.mentor_training.epochs
        self.mentors = find_mentors(teaching(recipe), epochs, self._print)
        untrained = [mentor.architecture for mentor in self.mentors if mentor.network is None]
        for name, training in (
            *([(recipe.student, recipe.training)] if recipe.student else []),
            *((name, recipe.mentor_training) for name in dict.fromkeys(untrained)),
        ):
            share = self.processes.share(training.batch_size)
            check_trainable(name, recipe.data.image_size, share)
        if recipe.student:
            self._check_labels()
            if self._method().uses_features:
                self._check_features()

    def _check_labels(self) -> None:
        """Raise UserError if the training mixes images for a method that takes no mixed labels."""
        recipe = self.recipe
        for name in ("mixup", "cutmix"):
            if (alpha := getattr(recipe.training, name)) and not self._method().soft_labels:
                raise UserError(
                    f"method {recipe.method} needs one class an image, which training.{name}="
                    f"{alpha} does not leave: set it to 0 or take another method"
                )

    def _check_features(self) -> None:
        """Raise UserError if the method cannot have the features that it asks for."""
        recipe, method = self.recipe, self._method()
        if recipe.compile:
            raise UserError(
                f"method {recipe.method} reads features, which torch.compile hides: leave out "
                "compile=true"
            )
        student, *mentors = (
            feature_shapes(name, recipe.data.image_size)
            for name in (recipe.student, *(mentor.architecture for mentor in self.mentors))
        )
        method.prepare(student, mentors)

    def run(
        self,
        train_set: ImageSet | ImageFiles,
        test_set: ImageSet | ImageFiles,
        out: Path,
        resume: bool = False,
        *,
        validation_set: ImageSet | ImageFiles | None = None,
        folders: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Train everything, write the run folder ``out`` with its report, return the summary.

        What the student's best epoch is chosen on is ``validation_set``, or where that is None a
        share of ``train_set``; nothing if the recipe's ``data.validation`` is 0. ``folders`` names
        the folder of each part that has one, for the user.

        With ``resume`` it goes on with the run that ``out`` holds, from its last checkpoint, to the
        same end: on a CPU bit for bit.

        Raises UserError if a given mentor does not fit the data, a training diverges, or the run
        to go on with had other inputs; OSError naming the file or ``out`` if writing fails; and
        KeyboardInterrupt with a message that says what is kept: at SIGINT and SIGTERM everything.
        """
        recipe, data = self.recipe, self.recipe.data
        if len(self.mentors) < len(recipe.mentors):
            used = (
                f"the mentor {self.mentors[0].name} only; the others"
                if self.mentors
                else "no mentor; they"
            )
            self._print(f"method {recipe.method} uses {used} are not loaded")
        mean, std = (data.mean, data.std) if data.mean else channel_statistics(train_set)
        self._info = NetworkInfo(
            recipe.student, train_set.classes, tuple(mean), tuple(std), data.image_size
        )
        for mentor in self.mentors:
            if mentor.network is not None:
                what = f"mentor {mentor.source}"
                if is_external(mentor.source) and len(mentor.info.classes) == len(
                    train_set.classes
                ):
                    self._print(f"{what}: its classes are taken to be the data's, in their order")
                    mentor.info = replace(mentor.info, classes=train_set.classes)
                mentor.network = fit_to_data(mentor.network, mentor.info, self._info, what)
                if mentor.info is None:
                    self._print(f"{what} does not say how to normalise; it gets what this data has")
                elif mentor.info.image_size != data.image_size:
                    own = mentor.info.image_size
                    self._print(f"{what} was trained on images of {own}×{own} pixels")
        try:
            sets = {"train": train_set, "test": test_set}
            if data.validation and validation_set is not None:
                sets["validation"] = validation_set
            elif data.validation:
                sets["train"], sets["validation"] = split_off(
                    train_set, data.validation, split_seed(recipe)
                )
            elif validation_set is not None:
                self._print(
                    f"{folders.get('validation', 'the validation part')} is not used: "
                    "data.validation is 0"
                )
            for name, images in sets.items():
                if len(images) < self.processes.world_size:
                    raise UserError(
                        f"{len(images)} {name} images cannot be shared out among "
                        f"{self.processes.world_size} processes"
                    )
            size = data.image_size
            loaders = open_loaders(data.loader, list(sets.values()), size, self.device)
            with ExitStack() as opened:
                self._held_out = {
                    name: opened.enter_context(
                        evaluation_loader(loaders, sets[name], self._info, **self.processes.place)
                    )
                    for name in ("validation", "test")
                    if name in sets
                }
                run = RunFolder(
                    out,
                    to_dict(recipe),
                    resume,
                    writes=self.processes.is_main,
                    tensorboard=recipe.tensorboard,
                )
                opened.callback(run.close)
                digests = {name: images.digest() for name, images in sets.items()}
                run.require_same(self._inputs(digests))
                run.begin(start(self.device, self.processes.world_size))
                self.processes.wait()
                counts = ", ".join(
                    f"{len(sets[name]):,} {name}{_origin(name, folders)}"
                    for name in ("train", "validation", "test")
                    if name in sets
                )
                self._print(
                    f"images: {counts}, of {len(train_set.classes)} classes; "
                    f"{device_name(self.device)}; run in {out}"
                )
                self._print(f"loader: {loaders.backend} ({loaders.reason})")
                interrupts = opened.enter_context(Interrupts())
                progress = opened.enter_context(TrainingProgress(self.console))
                trainer = NetworkTrainer(
                    recipe=recipe,
                    info=self._info,
                    train_set=sets["train"],
                    held_out=self._held_out,
                    loaders=loaders,
                    digests=digests,
                    dtype=self.dtype,
                    run=run,
                    store=self._store,
                    processes=self.processes,
                    interrupts=interrupts,
                    progress=progress,
                    notify=self._print,
                )
                results = self._train_all(trainer)
            summary = {
                "data": {
                    "name": Path(data.source).resolve().name,
                    "classes": len(train_set.classes),
                    "class_names": train_set.classes,
                    **{f"{name}_images": len(images) for name, images in sets.items()},
                },
                "method": recipe.method,
                "seed": recipe.seed,
                "device": device_name(self.device),
                "versions": versions(),
                "results": results,
            }
            run.finish(summary)
            if self.processes.is_main:
                write_report(out)
        except KeyboardInterrupt as interrupt:
            if (out / "inputs.json").exists():
                interrupt.args = (
                    f"records and checkpoints until now are in {out}: classroomkd train --resume "
                    f"{out} goes on",
                )
            raise
        except OSError as error:  # a write to a full disk does not say where
            error.filename = error.filename or str(out)
            raise
        return summary

    def _train_all(self, trainer: NetworkTrainer) -> list[dict[str, Any]]:
        """Train and measure every network; the results in the summary's order."""
        recipe, progress = self.recipe, trainer.progress
        # Given mentors come first, so that a sick one is found before anything is trained.
        results = {
            mentor.name: self._admit(mentor, trainer)
            for mentor in self.mentors
            if mentor.network is not None
        }
        trainings = self._trainings()
        phases = _phases(recipe)
        students = [
            TrainingJob(phase, recipe.student, recipe.student, recipe.training.epochs)
            for phase in phases
        ]
        steps = sum(map(trainer.steps, trainings.values()))
        progress.begin_run(steps + sum(trainer.steps([student]) for student in students))
        networks = {mentor.name: mentor.network for mentor in self.mentors}
        for roles in trainings.values():
            for role, (network, result) in zip(
                roles, trainer.train(roles, create("alone")), strict=True
            ):
                networks[role.name], results[role.name] = network, result
        for role in students:
            method, bank, lessons = create("alone"), None, None
            if role.phase == "classroom":
                method = self._method()
                bank = self._bank(networks, method)
                if method.reports:
                    lessons = Lessons(method, networks, self._held_out["test"], self.processes)
            # Number 0 alone too: the same first weights, the same batches.
            ((_, results[role.phase]),) = trainer.train([role], method, bank, lessons)
        return [results[key] for key in (*networks, *phases)]

    def _trainings(self) -> dict[tuple[str, int, int], list[TrainingJob]]:
        """The mentors to train, those of the same training, but for its last epoch, together."""
        counts, trainings = Counter(), {}
        for mentor in self.mentors:
            if mentor.network is None:
                kind = mentor.architecture, mentor.at
                counts[kind] += 1
                number = counts[kind]
                trainings.setdefault((mentor.architecture, mentor.epochs, number), []).append(
                    TrainingJob(
                        "mentor",
                        mentor.name,
                        mentor.architecture,
                        mentor.epochs,
                        mentor.at,
                        number,
                    )
                )
        return trainings

    def _method(self) -> Method:
        recipe = self.recipe
        if recipe.method != "classroom":
            return create(recipe.method, **recipe.method_options)
        across = self.processes.together and recipe.ranking_across_processes
        return create(
            "classroom",
            **vars(recipe.loss),
            process_group=dist.group.WORLD if across else None,
        )

    def _bank(self, mentors: Mapping[str, nn.Module], method: Method) -> MentorBank:
        return MentorBank(
            mentors,
            len(self._info.classes),
            device=self.device,
            dtype=self.dtype,
            compile=self.recipe.compile,
            features=method.uses_features,
        )

    def _inputs(self, digests: Mapping[str, str]) -> dict[str, str]:
        """The digests of all that the run reads."""
        files = {
            mentor.source: sha256_of(mentor.source)
            for mentor in self.mentors
            if is_checkpoint(mentor.source)
        }
        images = {f"the {name} images": digest for name, digest in digests.items()}
        return images | files

    def _admit(self, mentor: Mentor, trainer: NetworkTrainer) -> dict[str, Any]:
        """Measure a given mentor; raises UserError if its loss is not finite."""
        mentor.network.to(self.device, memory_format=torch.channels_last)
        measured = trainer.evaluate(mentor.network, "test")
        require_finite(measured, f"mentor {mentor.name} ({mentor.source})")
        return TrainingJob("mentor", mentor.name, mentor.architecture).result(
            mentor.network, measured
        )

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _origin(part: str, folders: Mapping[str, str]) -> str:
    """Where a part of the images comes from, to be put behind its name."""
    if part in folders:
        return f" ({folders[part]})"
    return f" (split off {folders['train']})" if folders else ""


def _phases(recipe: Recipe) -> list[str]:
    """What the student is trained as, in order."""
    if not recipe.student:
        return []
    if recipe.method == "alone":
        return ["alone"]
    return ["alone", "classroom"] if recipe.alone else ["classroom"]


def sha256_of(source: str) -> str:
    """The SHA-256 of a checkpoint, a file or the student's in a run folder."""
    path, _ = split_entry(source)
    with (student_file(path) if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
