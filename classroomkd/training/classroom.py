"""A whole run: the mentors, the student alone and in their classroom, the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from classroomkd import ClassroomLoss, models
from classroomkd.data import Augmentation, ImageSet, Loader, Loaders, channel_statistics
from classroomkd.models import NetworkInfo
from classroomkd.report import label, write_report
from classroomkd.training.evaluation import (
    Evaluation,
    evaluate,
    evaluation_loader,
    require_finite,
)
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

    ``data`` is what the data set is called, ``image_size`` its height and width in pixels;
    ``padding`` and ``flip`` augment the training images, which ``loader`` feeds;
    ``learning_rate`` is the schedules' peak.
    """

    data: str
    student: str
    mentors: tuple[MentorConfig, ...]
    epochs: int
    image_size: int
    padding: int
    flip: bool
    test_share: float
    batch_size: int = 64
    learning_rate: float = PEAK
    temperature: float = 12.0
    ranking: str = "sample"
    seed: int = 0
    device: str = "cpu"
    loader: str = "auto"


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
            "trained": self.epochs is not None,
            "epochs": self.epochs,
        }


class Classroom:
    """A student and its mentors.

    Building it checks all that can be wrong without the data, and raises UserError: names,
    checkpoints, the device, the sizes of images and batches.
    """

    def __init__(self, config: ClassroomConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.device = find_device(config.device)
        self.loss = ClassroomLoss(temperature=config.temperature, ranking=config.ranking)
        self.mentors = find_mentors(config.mentors)
        untrained = [mentor.architecture for mentor in self.mentors if mentor.network is None]
        for name in dict.fromkeys([config.student, *untrained]):
            check_trainable(name, config.image_size, config.batch_size)

    def run(self, train_set: ImageSet, test_set: ImageSet, out: Path) -> dict[str, Any]:
        """Train everything, write the run folder ``out`` with its report, return the summary.

        Raises UserError if a given mentor does not fit the data or a training diverges, OSError
        naming the file or ``out`` if writing fails, and KeyboardInterrupt with a message that says
        what is kept.
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
            self._loaders = Loaders(config.loader, (train_set, test_set), self.device)
            with evaluation_loader(self._loaders, test_set, self._info) as self._test_loader:
                self._run = Run(out, asdict(config))
                self._print(
                    f"{len(train_set):,} training and {len(test_set):,} held-out images of "
                    f"{len(train_set.classes)} classes; {device_name(self.device)}; run in {out}"
                )
                self._print(f"loader: {self._loaders.backend} ({self._loaders.reason})")
                results = self._train_all(train_set)
            summary = {
                "data": {
                    "name": Path(config.data).resolve().name,
                    "classes": len(train_set.classes),
                    "train_images": len(train_set),
                    "test_images": len(test_set),
                },
                "seed": config.seed,
                "device": device_name(self.device),
                "versions": versions(),
                "results": results,
            }
            self._run.finish(summary)
            write_report(out)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"records and checkpoints until now are in {out}") from None
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
        steps = max(len(train_set) // config.batch_size, 1)
        with TrainingProgress(self.console, epochs * steps) as self._progress:
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

    def _admit(self, mentor: Mentor, source: str) -> dict[str, Any]:
        """Measure the mentor given as ``source``; raises UserError if its loss is not finite."""
        mentor.network.to(self.device, memory_format=torch.channels_last)
        measured = evaluate(mentor.network, self._test_loader)
        require_finite(measured, f"mentor {mentor.name} ({source})")
        return _Part("mentor", mentor.name, mentor.architecture).result(mentor.network, measured)

    def _train(
        self,
        part: _Part,
        train_set: ImageSet,
        number: int,
        mentors: Mapping[str, nn.Module] | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Train, measure and save one network, the run's ``number``-th to draw random numbers."""
        seed = network_seed(self.config.seed, number)
        torch.manual_seed(seed)
        network = models.create(part.architecture, len(train_set.classes))
        network.to(self.device, memory_format=torch.channels_last)
        info = replace(self._info, architecture=part.architecture)
        called = label(part.phase, part.name)
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
            for epoch in range(1, part.epochs + 1):
                self._progress.begin(called, epoch, part.epochs)
                started = time.perf_counter()
                record = trainer.train_epoch(epoch, self._progress.step)
                measured = evaluate(network, self._test_loader)
                record |= {"test_loss": measured.loss, "test_top1": measured.top1}
                record["seconds"] = time.perf_counter() - started
                self._run.record({"phase": part.phase, "name": part.name} | record)
                trainer.require_finite(record)
                self._run.save_checkpoint(part.phase, part.name, trainer, epoch, info)
                self._progress.show(record)
        self._run.save_network(part.phase, part.name, network, info)
        self._progress.done(called, record)
        return network, part.result(network, measured)

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


def network_seed(seed: int, number: int) -> int:
    """A seed for the run's ``number``-th network, unrelated to those of other runs and networks."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
