"""A whole run: the mentors, the student alone and in their classroom, the report."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from classroomkd import ClassroomLoss, models
from classroomkd.data import Augmentation, ImageSet, Loader, Loaders, channel_statistics, split_off
from classroomkd.errors import UserError
from classroomkd.models import NetworkInfo
from classroomkd.report import label, write_report
from classroomkd.training.checkpoints import Saver
from classroomkd.training.config import Recipe, TrainingConfig, to_dict
from classroomkd.training.distributed import Processes, local_device
from classroomkd.training.evaluation import (
    Evaluation,
    evaluate,
    evaluation_loader,
    require_finite,
    taught,
)
from classroomkd.training.interrupts import Interrupts
from classroomkd.training.machine import device_name, find_device, find_precision, versions
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.mentors import (
    Mentor,
    check_trainable,
    find_mentors,
    fit_to_data,
    is_checkpoint,
    is_external,
    wherever,
)
from classroomkd.training.progress import TrainingProgress
from classroomkd.training.results import Part, best
from classroomkd.training.run import Run
from classroomkd.training.schedule import peak_learning_rate
from classroomkd.training.store import MentorStore
from classroomkd.training.trainer import Trainer


class Classroom:
    """A student and its mentors.

    Building it checks all that can be wrong without the data, and raises UserError: names,
    checkpoints, the device, the sizes of images and batches.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.device = local_device(find_device(recipe.device))
        self.processes = Processes(self.device)
        recipe = replace(
            recipe,
            mentors=[wherever(mentor) for mentor in recipe.mentors],
            device=self.device.type if self.processes.together else str(self.device),
            threads=recipe.threads or torch.get_num_threads(),
        )
        torch.set_num_threads(recipe.threads)
        torch.backends.cudnn.benchmark = True  # batches have one shape: the search pays
        self.recipe = recipe
        self.console = console if self.processes.is_main else Console(quiet=True)
        self.dtype = find_precision(recipe.precision, self.device)
        across = self.processes.together and recipe.ranking_across_processes
        self.loss = ClassroomLoss(
            **vars(recipe.loss), process_group=dist.group.WORLD if across else None
        )
        self._store = MentorStore()
        self.mentors = find_mentors(recipe.mentors, recipe.mentor_training.epochs)
        untrained = [mentor.architecture for mentor in self.mentors if mentor.network is None]
        for name, training in (
            *([(recipe.student, recipe.training)] if recipe.student else []),
            *((name, recipe.mentor_training) for name in dict.fromkeys(untrained)),
        ):
            share = self.processes.share(training.batch_size)
            check_trainable(name, recipe.data.image_size, share)

    def run(
        self,
        train_set: ImageSet,
        test_set: ImageSet,
        out: Path,
        resume: bool = False,
    ) -> dict[str, Any]:
        """Train everything, write the run folder ``out`` with its report, return the summary.

        With ``resume`` it goes on with the run that ``out`` holds, from its last checkpoint, to the
        same end: on a CPU bit for bit.

        Raises UserError if a given mentor does not fit the data, a training diverges, or the run
        to go on with had other inputs; OSError naming the file or ``out`` if writing fails; and
        KeyboardInterrupt with a message that says what is kept: at SIGINT and SIGTERM everything.
        """
        recipe, data = self.recipe, self.recipe.data
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
            if data.validation:
                sets["train"], sets["validation"] = split_off(
                    train_set, data.validation, recipe.seed
                )
            for name, images in sets.items():
                if len(images) < self.processes.world_size:
                    raise UserError(
                        f"{len(images)} {name} images cannot be shared out among "
                        f"{self.processes.world_size} processes"
                    )
            self._loaders = Loaders(data.loader, list(sets.values()), self.device)
            with ExitStack() as opened:
                self._held_out = {
                    name: opened.enter_context(
                        evaluation_loader(self._loaders, sets[name], self._info, **self._place)
                    )
                    for name in ("validation", "test")
                    if name in sets
                }
                self._run = Run(
                    out,
                    to_dict(recipe),
                    resume,
                    writes=self.processes.is_main,
                    tensorboard=recipe.tensorboard,
                )
                self._digests = {name: images.digest() for name, images in sets.items()}
                self._run.require_same(self._inputs())
                self.processes.wait()
                counts = ", ".join(f"{len(images):,} {name}" for name, images in sets.items())
                self._print(
                    f"images: {counts}, of {len(train_set.classes)} classes; "
                    f"{device_name(self.device)}; run in {out}"
                )
                self._print(f"loader: {self._loaders.backend} ({self._loaders.reason})")
                with Interrupts() as self._interrupts:
                    results = self._train_all(sets["train"])
            summary = {
                "data": {
                    "name": Path(data.source).resolve().name,
                    "classes": len(train_set.classes),
                    "class_names": train_set.classes,
                    **{f"{name}_images": len(images) for name, images in sets.items()},
                },
                "seed": recipe.seed,
                "device": device_name(self.device),
                "versions": versions(),
                "results": results,
                "taught": self._taught,
            }
            self._run.finish(summary)
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

    def _train_all(self, train_set: ImageSet) -> list[dict[str, Any]]:
        """Train and measure every network; the results in the summary's order."""
        recipe = self.recipe
        # Given mentors come first, so that a sick one is found before anything is trained.
        results = {
            mentor.name: self._admit(mentor)
            for mentor in self.mentors
            if mentor.network is not None
        }
        parts = [
            Part("mentor", mentor.name, mentor.architecture, mentor.epochs)
            for mentor in self.mentors
            if mentor.network is None
        ]
        students = [
            Part(phase, recipe.student, recipe.student, recipe.training.epochs)
            for phase in ("alone", "classroom")
            if recipe.student
        ]
        self._taught: dict[str, list[float | None]] = {}
        steps = sum(part.epochs * self._steps(part, train_set) for part in parts + students)
        with TrainingProgress(self.console, steps) as self._progress:
            twins = Counter()
            for mentor in self.mentors:
                if mentor.network is None:
                    twins[mentor.architecture] += 1
                    mentor.network, results[mentor.name] = self._train(
                        parts.pop(0), train_set, twins[mentor.architecture]
                    )
            mentors = {mentor.name: mentor.network for mentor in self.mentors}
            if not students:
                return [results[name] for name in mentors]
            bank = MentorBank(
                mentors,
                len(train_set.classes),
                device=self.device,
                dtype=self.dtype,
                compile=recipe.compile,
            )
            for part, teachers in zip(students, (None, bank), strict=True):
                # Both times number 0: the same first weights, the same batches.
                student, results[part.phase] = self._train(part, train_set, 0, teachers)
        self._taught = taught(student, mentors, self._held_out["test"], self.processes)
        return [results[key] for key in (*mentors, "alone", "classroom")]

    def _training(self, part: Part) -> TrainingConfig:
        """How a network is trained."""
        if part.phase == "mentor":
            return replace(self.recipe.mentor_training, epochs=part.epochs)
        return self.recipe.training

    def _steps(self, part: Part, train_set: ImageSet) -> int:
        """Of an epoch of a network."""
        return max(len(train_set) // self._training(part).batch_size, 1)

    def _inputs(self) -> dict[str, str]:
        """The digests of all that the run reads."""
        files = {
            mentor.source: sha256_of(mentor.source)
            for mentor in self.mentors
            if is_checkpoint(mentor.source)
        }
        images = {f"the {name} images": digest for name, digest in self._digests.items()}
        return images | files

    def _admit(self, mentor: Mentor) -> dict[str, Any]:
        """Measure a given mentor; raises UserError if its loss is not finite."""
        mentor.network.to(self.device, memory_format=torch.channels_last)
        measured = self._evaluate(mentor.network, "test")
        require_finite(measured, f"mentor {mentor.name} ({mentor.source})")
        return Part("mentor", mentor.name, mentor.architecture).result(mentor.network, measured)

    def _train(
        self,
        part: Part,
        train_set: ImageSet,
        number: int,
        mentors: MentorBank | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train, measure and save one network, the ``number``-th of its kind.

        What an earlier process has done of it is not done again, nor is a mentor trained that was
        trained so before.
        """
        run, key, called = self._run, (part.phase, part.name), label(part.phase, part.name)
        recipe, steps = self.recipe, self._steps(part, train_set)
        done = run.finished(*key)
        if done is not None:
            network, _, _ = models.load_network(run.network_path(*key))
            run.take_up(done["records"])
            self._progress.skip(len(done["records"]) * steps)
            return network.to(self.device, memory_format=torch.channels_last), done["result"]
        seed = network_seed(recipe.seed, number, part.architecture)
        deciding = self._deciding(part, train_set, seed)
        if deciding:
            network, kept = self._from_store(part, deciding)
            if network is not None:
                self._progress.skip(len(kept["records"]) * steps)
                return network, kept["result"]
        torch.manual_seed(seed)
        network = models.create(part.architecture, len(train_set.classes))
        network.to(self.device, memory_format=torch.channels_last)
        info = replace(self._info, architecture=part.architecture)
        training = self._training(part)
        with self._training_loader(train_set, training.batch_size, seed) as loader:
            trainer = Trainer(
                network,
                loader,
                training,
                name=called,
                peak=peak_learning_rate(training, part.architecture),
                mentors=mentors,
                loss=self.loss,
                dtype=self.dtype,
                cuda_graph=recipe.cuda_graph,
                compile=recipe.compile,
                processes=self.processes,
            )
            saver = Saver(
                run.checkpoints(*key),
                trainer,
                info,
                self._interrupts,
                epochs=recipe.checkpoint_epochs,
                minutes=recipe.checkpoint_minutes,
            )
            saver.restore(self._print)
            run.take_up(saver.records)
            self._progress.skip((trainer.epoch - 1) * steps + trainer.batch)
            while trainer.epoch <= part.epochs:
                self._progress.begin(called, trainer.epoch, part.epochs)
                record = self._train_epoch(trainer, saver)
                saver.records.append({"phase": part.phase, "name": part.name} | record)
                run.record(saver.records[-1])
                saver.after_epoch()
                self._progress.show(record)
            measured = self._evaluate(network, "test")
        result = part.result(network, measured) | best(saver.records)
        done = {"records": saver.records, "result": result}
        run.finish_network(*key, network, info, done)
        if deciding and self.processes.is_main:
            try:
                self._store.add(deciding, network, info, done)
            except OSError as error:
                self._print(f"{called} is not kept in the store: {error}")
        self._progress.done(called, saver.records[-1])
        return network, result

    def _deciding(self, part: Part, train_set: ImageSet, seed: int) -> dict[str, Any] | None:
        """All that decides a mentor's training, or None where the store is not asked."""
        if part.phase != "mentor" or not self.recipe.store:
            return None
        data = self.recipe.data
        return {
            "architecture": part.architecture,
            "training": asdict(self._training(part)),
            "images": self._digests,
            "classes": train_set.classes,
            **{name: getattr(data, name) for name in ("image_size", "padding", "flip", "cutout")},
            "mean": self._info.mean,
            "std": self._info.std,
            "seed": seed,
            "precision": str(self.dtype),
            "compile": self.recipe.compile,
            "processes": self.processes.world_size,
            "device": self.device.type,
            "threads": self.recipe.threads if self.device.type == "cpu" else None,
            "versions": versions(),
        }

    def _from_store(
        self, part: Part, deciding: Mapping[str, Any]
    ) -> tuple[nn.Module | None, dict[str, Any]]:
        """The mentor as it was trained before, measured anew on this run's images, if it was."""
        found = self._store.find(deciding, self._print)
        if found is None:
            return None, {}
        network, info, kept = found
        network.to(self.device, memory_format=torch.channels_last)
        measured = part.result(network, self._evaluate(network, "test"))
        kept["result"] = kept["result"] | measured | {"reused": True}
        self._run.take_up([record | {"name": part.name} for record in kept["records"]])
        self._run.finish_network(part.phase, part.name, network, info, kept)
        self._print(f"{label(part.phase, part.name)}: taken from {self._store.folder}")
        return network, kept

    def _train_epoch(self, trainer: Trainer, saver: Saver) -> dict[str, Any]:
        """Train and measure an epoch, or what is left of it."""
        started = time.perf_counter()

        def between_steps() -> None:
            self._progress.step()
            saver.between_steps()

        try:
            record = trainer.train_epoch(between_steps)
        except UserError as error:
            raise UserError(f"{error}{saver.last_good()}") from None
        for name in self._held_out:
            measured = self._evaluate(trainer.network, name)
            if not math.isfinite(measured.loss):
                raise UserError(
                    f"{trainer.name}, epoch {record['epoch']}: its loss on the {name} images is "
                    f"{measured.loss}: the training diverged; try a lower learning rate"
                    f"{saver.last_good()}"
                )
            record |= {f"{name}_loss": measured.loss, f"{name}_top1": measured.top1}
        record["seconds"] = time.perf_counter() - started
        return record

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @property
    def _place(self) -> dict[str, int]:
        """Where this process stands among the others, as loaders take it."""
        return {"rank": self.processes.rank, "world_size": self.processes.world_size}

    def _evaluate(self, network: nn.Module, part: str) -> Evaluation:
        self.processes.align(network)
        return evaluate(network, self._held_out[part], self.processes)

    def _training_loader(self, train_set: ImageSet, batch_size: int, seed: int) -> Loader:
        data = self.recipe.data
        return self._loaders.open(
            train_set,
            self.processes.share(batch_size),
            **self._place,
            mean=self._info.mean,
            std=self._info.std,
            augmentation=Augmentation(data.padding, data.flip, data.cutout),
            shuffle=True,
            drop_last=len(train_set) >= batch_size,
            seed=seed,
            dtype=self.dtype,
        )


def sha256_of(source: str) -> str:
    """The SHA-256 of a checkpoint, a file or the student's in a run folder."""
    path = Path(source)
    with (path / "student.safetensors" if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def network_seed(seed: int, number: int, architecture: str) -> int:
    """A seed for the ``number``-th network of its kind, unrelated to those of others and of runs.

    Mentors are counted from 1, so that one has the same seed in every run that it teaches in.
    """
    entropy = (seed, number, *architecture.encode())
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
