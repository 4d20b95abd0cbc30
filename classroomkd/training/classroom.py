"""A whole run: the mentors, the student alone and in their classroom, the report."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from classroomkd import ClassroomLoss, models
from classroomkd.data import Augmentation, ImageSet, Loader, Loaders, channel_statistics, split_off
from classroomkd.errors import UserError
from classroomkd.models import NetworkInfo
from classroomkd.report import label, write_report
from classroomkd.training.checkpoints import Saver
from classroomkd.training.evaluation import (
    Evaluation,
    evaluate,
    evaluation_loader,
    require_finite,
)
from classroomkd.training.interrupts import Interrupts
from classroomkd.training.machine import device_name, find_device, versions
from classroomkd.training.mentors import (
    Mentor,
    MentorConfig,
    check_trainable,
    find_mentors,
    fit_to_data,
)
from classroomkd.training.progress import TrainingProgress
from classroomkd.training.run import Run
from classroomkd.training.schedule import PEAK, mentor_learning_rate, student_learning_rate
from classroomkd.training.trainer import Trainer


@dataclass(frozen=True)
class ClassroomConfig:
    """Everything that decides a run's numbers; its config.yaml.

    ``data`` is a path, or "digits", and ``image_size`` the images' height and width in pixels.
    ``validation`` is the share of the training images that is split off by ``seed`` to make choices
    on; no network of the run trains on it. ``padding`` and ``flip`` augment the others, which
    ``loader`` feeds. ``learning_rate`` is the schedules' peak. A training's state is saved after so
    many epochs, and after so many minutes within one. On a CPU the numbers depend on the number of
    ``threads`` too.
    """

    data: str
    student: str
    mentors: tuple[MentorConfig, ...]
    epochs: int
    image_size: int
    padding: int
    flip: bool
    test_share: float
    validation: float = 0.0
    batch_size: int = 64
    learning_rate: float = PEAK
    temperature: float = 12.0
    ranking: str = "sample"
    seed: int = 0
    device: str = "cpu"
    loader: str = "auto"
    checkpoint_epochs: int = 1
    checkpoint_minutes: float = 5.0
    threads: int = 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassroomConfig:
        """What a config.yaml holds; raises TypeError or KeyError if that is something else."""
        mentors = tuple(MentorConfig(**mentor) for mentor in values["mentors"])
        return cls(**values | {"mentors": mentors})


@dataclass(frozen=True)
class _Part:
    """What a network is in the run; ``epochs`` is None if it is not trained here."""

    phase: str
    name: str
    architecture: str
    epochs: int | None = None

    def result(self, network: nn.Module, measured: Evaluation) -> dict[str, Any]:
        """The network's entry in summary.json."""
        return {
            "phase": self.phase,
            "name": self.name,
            "architecture": self.architecture,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "top1": measured.top1,
            "top5": measured.top5,
            "loss": measured.loss,
            "calibration_error": measured.calibration_error,
            "per_class": measured.per_class,
            "trained": self.epochs is not None,
            "epochs": self.epochs,
        }


class Classroom:
    """A student and its mentors.

    Building it checks all that can be wrong without the data, and raises UserError: names,
    checkpoints, the device, the sizes of images and batches.
    """

    def __init__(self, config: ClassroomConfig, console: Console) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.console = console
        self.device = find_device(config.device)
        self.loss = ClassroomLoss(temperature=config.temperature, ranking=config.ranking)
        self.mentors = find_mentors(config.mentors)
        untrained = [mentor.architecture for mentor in self.mentors if mentor.network is None]
        for name in dict.fromkeys([config.student, *untrained]):
            check_trainable(name, config.image_size, config.batch_size)

    def run(
        self, train_set: ImageSet, test_set: ImageSet, out: Path, resume: bool = False
    ) -> dict[str, Any]:
        """Train everything, write the run folder ``out`` with its report, return the summary.

        With ``resume`` it goes on with the run that ``out`` holds, from its last checkpoint, to the
        same end: on a CPU bit for bit.

        Raises UserError if a given mentor does not fit the data, a training diverges, or the run
        to go on with had other inputs; OSError naming the file or ``out`` if writing fails; and
        KeyboardInterrupt with a message that says what is kept: at SIGINT and SIGTERM everything.
        """
        config = self.config
        mean, std = channel_statistics(train_set)
        self._info = NetworkInfo(
            config.student, train_set.classes, tuple(mean), tuple(std), config.image_size
        )
        for mentor, mentor_config in zip(self.mentors, config.mentors, strict=True):
            if mentor.network is not None:
                what = f"mentor {mentor_config.source}"
                mentor.network = fit_to_data(mentor.network, mentor.info, self._info, what)
                if mentor.info is None:
                    self._print(f"{what} does not say how to normalise; it gets what this data has")
                elif mentor.info.image_size != config.image_size:
                    own = mentor.info.image_size
                    self._print(f"{what} was trained on images of {own}×{own} pixels")
        try:
            sets = {"train": train_set, "test": test_set}
            if config.validation:
                sets["train"], sets["validation"] = split_off(
                    train_set, config.validation, config.seed
                )
            self._loaders = Loaders(config.loader, list(sets.values()), self.device)
            with ExitStack() as opened:
                self._held_out = {
                    name: opened.enter_context(
                        evaluation_loader(self._loaders, sets[name], self._info)
                    )
                    for name in ("validation", "test")
                    if name in sets
                }
                self._run = Run(out, asdict(config), resume)
                self._run.require_same(self._inputs(sets))
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
                    "name": Path(config.data).resolve().name,
                    "classes": len(train_set.classes),
                    **{f"{name}_images": len(images) for name, images in sets.items()},
                },
                "seed": config.seed,
                "device": device_name(self.device),
                "versions": versions(),
                "results": results,
            }
            self._run.finish(summary)
            write_report(out)
        except KeyboardInterrupt as interrupt:
            interrupt.args = (
                f"records and checkpoints until now are in {out}: classroomkd train --resume {out} "
                "goes on",
            )
            raise
        except OSError as error:  # a write to a full disk does not say where
            error.filename = error.filename or str(out)
            raise
        return summary

    def _train_all(self, train_set: ImageSet) -> list[dict[str, Any]]:
        """Train and measure every network; the results in the summary's order."""
        config = self.config
        # Given mentors come first, so that a sick one is found before anything is trained.
        results = {
            mentor.name: self._admit(mentor, mentor_config.source)
            for mentor, mentor_config in zip(self.mentors, config.mentors, strict=True)
            if mentor.network is not None
        }
        epochs = sum(m.epochs for m in self.mentors if m.network is None) + 2 * config.epochs
        self._steps = max(len(train_set) // config.batch_size, 1)
        with TrainingProgress(self.console, epochs * self._steps) as self._progress:
            for number, mentor in enumerate(self.mentors, start=1):
                if mentor.network is None:
                    part = _Part("mentor", mentor.name, mentor.architecture, mentor.epochs)
                    mentor.network, results[mentor.name] = self._train(part, train_set, number)
            mentors = {mentor.name: mentor.network for mentor in self.mentors}
            for phase, teachers in (("alone", {}), ("classroom", mentors)):
                part = _Part(phase, config.student, config.student, config.epochs)
                # Both times number 0: the same first weights, the same batches.
                _, results[phase] = self._train(part, train_set, 0, teachers)
        return [results[key] for key in (*mentors, "alone", "classroom")]

    def _inputs(self, sets: Mapping[str, ImageSet]) -> dict[str, str]:
        """The digests of all that the run reads."""
        files = {
            mentor_config.source: sha256_of(mentor_config.source)
            for mentor_config in self.config.mentors
            if mentor_config.epochs is None
        }
        return {f"the {name} images": images.digest() for name, images in sets.items()} | files

    def _admit(self, mentor: Mentor, source: str) -> dict[str, Any]:
        """Measure the mentor given as ``source``; raises UserError if its loss is not finite."""
        mentor.network.to(self.device, memory_format=torch.channels_last)
        measured = evaluate(mentor.network, self._held_out["test"])
        require_finite(measured, f"mentor {mentor.name} ({source})")
        return _Part("mentor", mentor.name, mentor.architecture).result(mentor.network, measured)

    def _train(
        self,
        part: _Part,
        train_set: ImageSet,
        number: int,
        mentors: Mapping[str, nn.Module] | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train, measure and save one network, the run's ``number``-th to draw random numbers.

        What an earlier process has done of it is not done again.
        """
        run, key, called = self._run, (part.phase, part.name), label(part.phase, part.name)
        done = run.finished(*key)
        if done is not None:
            network, _, _ = models.load_network(run.network_path(*key))
            run.take_up(done["records"])
            self._progress.skip(len(done["records"]) * self._steps)
            return network.to(self.device, memory_format=torch.channels_last), done["result"]
        seed = network_seed(self.config.seed, number)
        torch.manual_seed(seed)
        network = models.create(part.architecture, len(train_set.classes))
        network.to(self.device, memory_format=torch.channels_last)
        info = replace(self._info, architecture=part.architecture)
        rate = mentor_learning_rate if part.phase == "mentor" else student_learning_rate
        with self._training_loader(train_set, seed) as loader:
            trainer = Trainer(
                network,
                loader,
                name=called,
                epochs=part.epochs,
                schedule=partial(rate, peak=self.config.learning_rate),
                mentors=mentors,
                loss=self.loss,
            )
            saver = Saver(
                run.checkpoints(*key),
                trainer,
                info,
                self._interrupts,
                epochs=self.config.checkpoint_epochs,
                minutes=self.config.checkpoint_minutes,
            )
            saver.restore(self._print)
            if saver.records or trainer.batch:
                run.take_up(saver.records)
                self._progress.skip((trainer.epoch - 1) * self._steps + trainer.batch)
            while trainer.epoch <= part.epochs:
                self._progress.begin(called, trainer.epoch, part.epochs)
                record = self._train_epoch(trainer, saver)
                saver.records.append({"phase": part.phase, "name": part.name} | record)
                run.record(saver.records[-1])
                saver.after_epoch()
                self._progress.show(record)
            measured = evaluate(network, self._held_out["test"])
        result = part.result(network, measured) | best(saver.records)
        done = {"records": saver.records, "result": result}
        run.finish_network(*key, network, info, done)
        self._progress.done(called, saver.records[-1])
        return network, result

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
        for name, loader in self._held_out.items():
            measured = evaluate(trainer.network, loader)
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

    def _training_loader(self, train_set: ImageSet, seed: int) -> Loader:
        batch_size = self.config.batch_size
        return self._loaders.open(
            train_set,
            batch_size,
            mean=self._info.mean,
            std=self._info.std,
            augmentation=Augmentation(self.config.padding, self.config.flip),
            shuffle=True,
            drop_last=len(train_set) >= batch_size,
            seed=seed,
        )


def best(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What epochs that are chosen afterwards would have given, for the summary.

    ``best_test_top1`` is the highest top-1 on the test images, which papers print and which is
    chosen on them; ``chosen_epoch`` and ``chosen_top1``, the test top-1 of the epoch with the
    highest on the validation images, where there are any.
    """
    kept = {"best_test_top1": max(record["test_top1"] for record in records)}
    if "validation_top1" in records[0]:
        chosen = max(records, key=lambda record: record["validation_top1"])
        kept |= {"chosen_epoch": chosen["epoch"], "chosen_top1": chosen["test_top1"]}
    return kept


def sha256_of(source: str) -> str:
    """The SHA-256 of a checkpoint, a file or the student's in a run folder."""
    path = Path(source)
    with (path / "student.safetensors" if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def network_seed(seed: int, number: int) -> int:
    """A seed for the run's ``number``-th network, unrelated to those of other runs and networks."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
