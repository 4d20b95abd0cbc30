"""Training the networks of one run, each from where it stands: finished, in the store, or begun."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classroomkd import models
from classroomkd.data import ImageFiles, ImageSet, Loader, Loaders
from classroomkd.errors import UserError
from classroomkd.loss.methods import Method
from classroomkd.models import NetworkInfo
from classroomkd.report import label
from classroomkd.runs.at_chance import is_at_chance, most_frequent, remedies
from classroomkd.runs.checkpoints import Saver
from classroomkd.runs.identity import mentor_values
from classroomkd.runs.images import training_augmentation, training_mixing
from classroomkd.runs.interrupts import Interrupts
from classroomkd.runs.jobs import TrainingJob, best
from classroomkd.runs.machine import versions
from classroomkd.runs.progress import TrainingProgress
from classroomkd.runs.recipe import Recipe, TrainingConfig, mentor_seed
from classroomkd.runs.run_folder import RunFolder
from classroomkd.runs.store import MentorStore
from classroomkd.training.distributed import Processes
from classroomkd.training.evaluation import Evaluation, Lessons, evaluate
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.schedule import peak_learning_rate
from classroomkd.training.trainer import Trainer

Trained = tuple[nn.Module, dict[str, Any]]


@dataclass(kw_only=True)
class NetworkTrainer:
    """Trains the networks of a run, and measures, records and saves them.

    ``info`` is of any network of the run, ``held_out`` has a loader of each part of the images that
    is measured, "test" last, ``digests`` tells the parts' contents, and ``notify`` takes lines for
    the user.
    """

    recipe: Recipe
    info: NetworkInfo
    train_set: ImageSet | ImageFiles
    held_out: Mapping[str, Loader]
    loaders: Loaders
    digests: Mapping[str, str]
    dtype: torch.dtype
    run: RunFolder
    store: MentorStore
    processes: Processes
    interrupts: Interrupts
    progress: TrainingProgress
    notify: Callable[[str], None]

    def train(
        self,
        roles: Sequence[TrainingJob],
        method: Method,
        mentors: MentorBank | None = None,
        lessons: Lessons | None = None,
    ) -> list[Trained]:
        """The networks of one training, in the order of ``roles``, with their results.

        ``roles`` differ in the epoch that they are taken from only. What an earlier process has
        done of it is not done again, nor is a mentor trained that was trained so before, or that
        another process trains meanwhile. With ``lessons`` the mentors' records hold these too.
        """
        done = {role.name: self._finished(role) for role in roles}
        missing = sorted((p for p in roles if not done[p.name]), key=lambda role: role.last)
        if missing:
            with self._claimed(missing[-1]):
                for role in list(missing):
                    done[role.name] = self._from_store(role)
                    if done[role.name]:
                        missing.remove(role)
                self._skip(roles, missing)
                if missing:
                    done |= self._train(missing, method, mentors, lessons)
        else:
            self._skip(roles, missing)
        return [done[role.name] for role in roles]

    def steps(self, roles: Sequence[TrainingJob]) -> int:
        """Of a training that has been planned for ``roles``; 0 of none."""
        if not roles:
            return 0
        of_an_epoch = max(len(self.train_set) // self._training(roles[0]).batch_size, 1)
        return max(role.last for role in roles) * of_an_epoch

    def _skip(self, roles: Sequence[TrainingJob], missing: Sequence[TrainingJob]) -> None:
        self.progress.skip(self.steps(roles) - self.steps(missing))

    def evaluate(
        self,
        network: nn.Module,
        part: str,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Evaluation:
        """Measure ``network`` on a held-out part, whose logits and targets ``watch`` may see."""
        self.processes.align(network)
        return evaluate(network, self.held_out[part], self.processes, watch)

    def _train(
        self,
        roles: Sequence[TrainingJob],
        method: Method,
        mentors: MentorBank | None,
        lessons: Lessons | None,
    ) -> dict[str, Trained]:
        """Train up to the last of ``roles``, keeping the others on the way."""
        role, done = roles[-1], {}
        key, called = (role.phase, role.name), label(role.phase, role.name, self.recipe.method)
        seed = self._seed(role)
        torch.manual_seed(seed)
        network = models.create(role.architecture, len(self.info.classes))
        network.to(self.device, memory_format=torch.channels_last)
        info, training = replace(self.info, architecture=role.architecture), self._training(role)
        if training.batch_size > (count := len(self.train_set)):
            self.notify(f"{called}: a batch of {training.batch_size} takes in all {count} images")
        with self._training_loader(training, seed) as loader:
            trainer = Trainer(
                network,
                loader,
                training,
                name=called,
                peak=peak_learning_rate(training, role.architecture),
                method=method,
                mentors=mentors,
                image_size=info.image_size,
                dtype=self.dtype,
                cuda_graph=self.recipe.cuda_graph,
                compile=self.recipe.compile,
                processes=self.processes,
            )
            saver = Saver(
                self.run.checkpoints(*key, keep=self.recipe.checkpoint_keep),
                trainer,
                info,
                self.interrupts,
                epochs=self.recipe.checkpoint_epochs,
                minutes=self.recipe.checkpoint_minutes,
                keeps_best=role.phase != "mentor",
            )
            saver.restore(self.notify)
            if (trainer.epoch, trainer.batch) != (1, 0) and trainer.epoch <= role.last:
                within = f", batch {trainer.batch + 1} of {len(loader)}" if trainer.batch else ""
                self.notify(f"{called}: resuming from epoch {trainer.epoch}{within}")
            self.run.adopt_records(saver.records)
            self.progress.skip((trainer.epoch - 1) * len(loader) + trainer.batch)
            measured = None
            while trainer.epoch <= role.last:
                self.progress.begin(called, trainer.epoch, role.last)
                record, measured = self._train_epoch(trainer, saver, lessons)
                record |= self._chance(role, called, [*saver.records, record], len(loader), mentors)
                saver.records.append(
                    {"phase": role.phase, "name": role.name} | record | {"epochs": role.last}
                )
                self.run.record(saver.records[-1])
                for earlier in roles[:-1]:
                    if record["epoch"] == earlier.last:
                        self._finish(earlier, network, info, measured, saver.records)
                saver.after_epoch()
                self.progress.show(record)
            if measured is None:  # an earlier process got as far as the last epoch
                measured = self.evaluate(network, "test")
        if saver.keeps_best and (epoch := saver.best_epoch()):
            self.run.keep_best(*key, saver.checkpoints.best(epoch))
        result = self._finish(role, network, info, measured, saver.records)
        self.progress.done(called, saver.records[-1])
        for earlier in roles[:-1]:
            done[earlier.name] = self._finished(earlier)
        return done | {role.name: (network, result)}

    def _chance(
        self,
        role: TrainingJob,
        called: str,
        records: Sequence[Mapping[str, Any]],
        steps: int,
        mentors: MentorBank | None,
    ) -> dict[str, float]:
        """What the last of ``records`` gets more if the network is at chance, told the first time.

        It is ``chance_top1``, the share of the most frequent class.
        """
        chance = most_frequent(self.train_set.targets)
        images = min(steps * self._training(role).batch_size, len(self.train_set))
        if not is_at_chance(records, chance=chance, steps=steps, images=images):
            return {}
        if not any("chance_top1" in record for record in records):
            tries = remedies(self.recipe, role.phase, len(self.info.classes), len(mentors or ()))
            self.notify(
                f"{called}, epoch {records[-1]['epoch']}: training top-1 is "
                f"{records[-1]['train_top1']:.1%}, at chance: naming the most frequent class gives "
                f"{chance:.1%}; {tries}"
            )
        return {"chance_top1": chance}

    def _finish(
        self,
        role: TrainingJob,
        network: nn.Module,
        info: NetworkInfo,
        measured: Evaluation,
        records: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Write what a role's network has become, into the store too, and return its result."""
        own = {"name": role.name, "epochs": role.last}
        records = [record | own for record in records]
        result = role.result(network, measured) | best(records)
        done = {"records": records, "result": result}
        deciding = self._store_key(role)
        if deciding and self.processes.is_main:  # before this run counts it as done
            try:
                self.store.add(deciding, network, info, done)
            except OSError as error:
                self.notify(f"{label(role.phase, role.name)} is not kept in the store: {error}")
        self.run.finish_network(role.phase, role.name, network, info, done)
        return result

    def _finished(self, role: TrainingJob) -> Trained | None:
        """The network as an earlier process of this run has trained it, if it has."""
        done = network = None
        if self.processes.is_main and (done := self.run.finished(role.phase, role.name)):
            network, _, _ = models.load_network(self.run.network_path(role.phase, role.name))
        done, network = self.processes.from_main((done, network))
        if done is None:
            return None
        self.run.adopt_records(done["records"])
        return network.to(self.device, memory_format=torch.channels_last), done["result"]

    def _claimed(self, role: TrainingJob) -> Any:
        """Within it no other process trains the same mentor for the store."""
        deciding = self._store_key(role)
        if deciding is None or self.processes.together:  # those must not wait for one another
            return nullcontext()
        return self.store.claim(deciding, self.notify, self.interrupts)

    def _from_store(self, role: TrainingJob) -> Trained | None:
        """The mentor as it was trained before, measured anew on this run's images, if it was."""
        deciding = self._store_key(role)
        found = None
        if deciding and self.processes.is_main:  # others may have a cache of their own
            found = self.store.find(deciding, self.notify)
        found = self.processes.from_main(found)
        if found is None:
            return None
        network, info, kept = found
        network.to(self.device, memory_format=torch.channels_last)
        measured = role.result(network, self.evaluate(network, "test"))
        kept["result"] = kept["result"] | measured | {"reused": True}
        kept["records"] = [record | {"name": role.name} for record in kept["records"]]
        self.run.adopt_records(kept["records"])
        self.run.finish_network(role.phase, role.name, network, info, kept)
        self.notify(f"{label(role.phase, role.name)}: taken from {self.store.folder}")
        return network, kept["result"]

    def _store_key(self, role: TrainingJob) -> dict[str, Any] | None:
        """All that decides a mentor's training, or None where the store is not asked."""
        if role.phase != "mentor" or not self.recipe.store:
            return None
        data = self.recipe.data
        return {
            "architecture": role.architecture,
            "training": self._training(role).deciding(),
            "epoch": role.last,
            "images": dict(self.digests),
            "classes": self.info.classes,
            "image_size": data.image_size,
            "augmentation": repr(training_augmentation(data)),
            # That resize photographs each in its own way.
            "loader": self.loaders.backend if data.crop == "resize" else None,
            "mean": self.info.mean,
            "std": self.info.std,
            "seed": self._seed(role),
            **mentor_values(self.recipe),
            "precision": str(self.dtype),
            "processes": self.processes.world_size,
            "device": self.device.type,
            "threads": self.recipe.threads if self.device.type == "cpu" else None,
            "versions": versions(),
        }

    def _train_epoch(
        self, trainer: Trainer, saver: Saver, lessons: Lessons | None
    ) -> tuple[dict[str, Any], Evaluation]:
        """Train and measure an epoch, or what is left of it; its record, and the test part's."""
        started = time.perf_counter()

        def between_steps() -> None:
            self.progress.step()
            saver.between_steps()

        try:
            record = trainer.train_epoch(between_steps)
        except UserError as error:
            raise UserError(f"{error}{saver.last_good()}") from None
        for name in self.held_out:  # the test part is the last of them
            watch = lessons.watch if lessons and name == "test" else None
            measured = self.evaluate(trainer.network, name, watch)
            if not math.isfinite(measured.loss):
                raise UserError(
                    f"{trainer.name}, epoch {record['epoch']}: its loss on the {name} images is "
                    f"{measured.loss}: the training diverged; try a lower learning rate"
                    f"{saver.last_good()}"
                )
            record |= {f"{name}_loss": measured.loss, f"{name}_top1": measured.top1}
        if lessons:
            for name, shares in lessons.shares().items():
                record["mentors"][name]["taught"] = shares
        record["seconds"] = time.perf_counter() - started
        return record, measured

    def _training_loader(self, training: TrainingConfig, seed: int) -> Loader:
        batch_size = training.batch_size
        return self.loaders.open(
            self.train_set,
            self.processes.share(batch_size),
            **self.processes.place,
            mean=self.info.mean,
            std=self.info.std,
            augmentation=training_augmentation(self.recipe.data),
            mixing=training_mixing(training, len(self.info.classes)),
            shuffle=True,
            drop_last=len(self.train_set) >= batch_size,
            seed=seed,
            dtype=self.dtype,
        )

    def _training(self, role: TrainingJob) -> TrainingConfig:
        """How a network is trained."""
        if role.phase == "mentor":
            return replace(self.recipe.mentor_training, epochs=role.epochs)
        return self.recipe.training

    def _seed(self, role: TrainingJob) -> int:
        seed = mentor_seed(self.recipe) if role.phase == "mentor" else self.recipe.seed
        return network_seed(seed, role.number, role.architecture)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.processes.device


def network_seed(seed: int, number: int, architecture: str) -> int:
    """A seed for the ``number``-th network of its kind, unrelated to those of others and of runs.

    Mentors are counted from 1, so that one has the same seed in every run that it teaches in.
    """
    entropy = (seed, number, *architecture.encode())
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
