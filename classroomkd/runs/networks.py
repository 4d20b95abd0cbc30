"""Train the networks of one run; finished, stored and interrupted trainings are not repeated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from classroomkd.data import Loader
from classroomkd.data.batches import Batches
from classroomkd.errors import UserError
from classroomkd.loss.methods import Method
from classroomkd.models import NetworkInfo
from classroomkd.models.layout import bare, to_channels_last
from classroomkd.report.records import label
from classroomkd.runs.at_chance import is_at_chance, most_frequent, remedies
from classroomkd.runs.checkpoints import Saver
from classroomkd.runs.context import RunContext
from classroomkd.runs.images import example_of, training_augmentation, training_mixing
from classroomkd.runs.jobs import TrainingJob, best
from classroomkd.runs.mentor_setup import renormalised
from classroomkd.runs.progress import TrainingProgress
from classroomkd.runs.run_folder import RunFolder
from classroomkd.runs.stored_mentors import StoredMentors
from classroomkd.training.evaluation import Evaluation, TeachingShares, evaluate
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.mentor_cache import CachedMentors
from classroomkd.training.schedule import peak_learning_rate
from classroomkd.training.trainer import Trainer

Trained = tuple[nn.Module, dict[str, Any]]

_SILENT = 0.001  # of an epoch's rows


@dataclass(kw_only=True)
class NetworkTrainer(RunContext):
    """Trains the networks of a run, and measures, records and saves them.

    ``held_out`` has a loader for each part of the images on which networks are measured, "test"
    last.
    """

    held_out: Mapping[str, Loader]
    run: RunFolder
    stored: StoredMentors
    progress: TrainingProgress

    def train(
        self,
        jobs: Sequence[TrainingJob],
        method: Method,
        mentors: MentorBank | CachedMentors | None = None,
        teaching: TeachingShares | None = None,
    ) -> list[Trained]:
        """The networks of one training, in the order of ``jobs``, with their results.

        ``jobs`` differ only in the epoch whose weights are used. Networks that an earlier process
        of the run has trained are not trained again, nor are mentors that are in the store or that
        another process is training for it. With ``teaching`` the records of epochs also say which
        classes each mentor taught.
        """
        done = {job.name: found for job in jobs if (found := self._finished(job))}
        missing = sorted((j for j in jobs if j.name not in done), key=lambda job: job.last)
        with self.stored.claim(missing[-1]) if missing else nullcontext():
            for job in list(missing):
                if stored := self._from_store(job):
                    done[job.name] = stored
                    missing.remove(job)
            self.progress.advance(self.steps(jobs) - self.steps(missing))
            if missing:
                done |= self._train(missing, method, mentors, teaching)
        return [done[job.name] for job in jobs]

    def steps(self, jobs: Sequence[TrainingJob]) -> int:
        """The number of training steps for ``jobs``; 0 if there are none."""
        if not jobs:
            return 0
        per_epoch = max(len(self.sets["train"]) // jobs[0].training(self.recipe).batch_size, 1)
        return max(job.last for job in jobs) * per_epoch

    def evaluate(
        self, network: nn.Module, part: str, watch: Callable[[Tensor, Tensor], None] | None = None
    ) -> Evaluation:
        """Measure ``network`` on a held-out part; ``watch`` gets each batch's logits, targets."""
        self.processes.align(network)
        return evaluate(network, self.held_out[part], self.processes, watch)

    def _train(
        self,
        jobs: Sequence[TrainingJob],
        method: Method,
        mentors: MentorBank | CachedMentors | None,
        teaching: TeachingShares | None,
    ) -> dict[str, Trained]:
        """Train up to the last epoch of ``jobs``, and save the earlier ones."""
        job, seed = jobs[-1], jobs[-1].seed(self.recipe)
        torch.manual_seed(seed)
        network, beginning = self.builder.create(
            job.architecture, len(self.info.classes), job.weights, self.notify
        )
        network = self._placed(job, network)
        with self._training_loader(job) as loader:
            trainer = self._trainer(job, network, loader, method, mentors)
            saver = self._saver(job, trainer)
            if not self._resume(job, saver):
                self.notify(f"{trainer.name} {beginning}")
            measured = self._train_epochs(jobs, saver, teaching)
        if saver.keeps_best and (epoch := saver.best_epoch()):
            self.run.keep_best(job.phase, job.name, saver.checkpoints.best(epoch))
        result = self._finish(job, saver, measured)
        self.progress.done(trainer.name, saver.records[-1])
        done = {j.name: found for j in jobs[:-1] if (found := self._finished(j))}
        return done | {job.name: (network, result)}

    def _trainer(
        self,
        job: TrainingJob,
        network: nn.Module,
        loader: Loader,
        method: Method,
        mentors: MentorBank | CachedMentors | None,
    ) -> Trainer:
        training = job.training(self.recipe)
        called = label(job.phase, job.name, self.recipe.method)
        if training.batch_size > (count := len(self.sets["train"])):
            self.notify(f"{called}: a batch of {training.batch_size} contains all {count} images")
        return Trainer(
            network,
            loader,
            training,
            name=called,
            peak=peak_learning_rate(training, network),
            method=method,
            mentors=mentors,
            example=example_of(self.sets["train"], self.info.image_size),
            dtype=self.dtype,
            cuda_graph=self.recipe.cuda_graph and loader.one_shape,
            compile=self.recipe.compile,
            processes=self.processes,
        )

    def _saver(self, job: TrainingJob, trainer: Trainer) -> Saver:
        return Saver(
            self.run.checkpoints(job.phase, job.name, keep=self.recipe.checkpoint_keep),
            trainer,
            self._info(job),
            self.interrupts,
            epochs=self.recipe.checkpoint_epochs,
            minutes=self.recipe.checkpoint_minutes,
            keeps_best=job.phase != "mentor",
        )

    def _info(self, job: TrainingJob) -> NetworkInfo:
        mean, std = job.mean or self.info.mean, job.std or self.info.std
        code = self.builder.code(job.architecture)
        return replace(self.info, architecture=job.architecture, code=code, mean=mean, std=std)

    def _placed(self, job: TrainingJob, network: nn.Module) -> nn.Module:
        """A network on the run's device, for images as the run's loaders normalise them."""
        fitted = renormalised(network, self.info, job.mean, job.std)
        return to_channels_last(fitted, self.processes.device)

    def _resume(self, job: TrainingJob, saver: Saver) -> bool:
        """Restore the last training state of an earlier process, and its records, if any."""
        trainer, steps = saver.trainer, len(saver.trainer.loader)
        found = saver.restore(self.notify)
        if (trainer.epoch, trainer.batch) != (1, 0) and trainer.epoch <= job.last:
            within = f", batch {trainer.batch + 1} of {steps}" if trainer.batch else ""
            self.notify(f"{trainer.name}: resuming from epoch {trainer.epoch}{within}")
        self.run.adopt_records(saver.records)
        self.progress.advance((trainer.epoch - 1) * steps + trainer.batch)
        return found

    def _train_epochs(
        self, jobs: Sequence[TrainingJob], saver: Saver, teaching: TeachingShares | None
    ) -> Evaluation:
        """Train to the last epoch of ``jobs``, and finish the other jobs at their epochs.

        Returns the measurement of the last epoch on the test images.
        """
        job, trainer, measured = jobs[-1], saver.trainer, None
        while trainer.epoch <= job.last:
            self.progress.begin(trainer.name, trainer.epoch, job.last)
            record, measured = self._train_epoch(trainer, saver, teaching)
            record |= self._chance(job, trainer, [*saver.records, record])
            self._warn_silent(record, saver.records)
            saver.records.append(
                {"phase": job.phase, "name": job.name} | record | {"epochs": job.last}
            )
            self.run.record(saver.records[-1])
            for earlier in jobs[:-1]:
                if record["epoch"] == earlier.last:
                    self._finish(earlier, saver, measured)
            saver.after_epoch()
            self.progress.show(record)
        if measured is None:  # an earlier process had reached the last epoch
            measured = self.evaluate(trainer.network, "test")
        return measured

    def _chance(
        self, job: TrainingJob, trainer: Trainer, records: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """The additions to the last of ``records`` if the network is at chance; warns once.

        They are ``chance_top1``, the share of the most frequent class.
        """
        train_set = self.sets["train"]
        if isinstance(train_set, Batches):  # the shares of its classes are unknown
            return {}
        chance, steps = most_frequent(train_set.targets), len(trainer.loader)
        images = min(steps * trainer.training.batch_size, len(train_set))
        if not is_at_chance(records, chance=chance, steps=steps, images=images):
            return {}
        if not any("chance_top1" in record for record in records):
            n_mentors = len(trainer.mentors or ())
            tries = remedies(self.recipe, job.phase, len(self.info.classes), n_mentors)
            self.notify(
                f"{trainer.name}, epoch {records[-1]['epoch']}: training top-1 is "
                f"{records[-1]['train_top1']:.1%}, at chance: always predicting the most frequent "
                f"class gives {chance:.1%}; {tries}"
            )
        return {"chance_top1": chance}

    def _warn_silent(self, record: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> None:
        """Warn about mentors that taught almost nothing in this epoch, once each."""
        for name, of in record.get("mentors", {}).items():
            if of["active_share"] < _SILENT and not any(
                before["mentors"][name]["active_share"] < _SILENT for before in earlier
            ):
                self.notify(
                    f"epoch {record['epoch']}: mentor {name} taught {of['active_share']:.2%} of "
                    "the images: the student is better on nearly all images, or the mentor has a "
                    "fault, which classroomkd check may find"
                )

    def _finish(self, job: TrainingJob, saver: Saver, measured: Evaluation) -> dict[str, Any]:
        """Save a job's trained network, in the store too, and return its result."""
        network, info = saver.trainer.network, saver.info
        own = {"name": job.name, "epochs": job.last}
        records = [record | own for record in saver.records]
        result = job.result(network, measured) | best(records)
        done = {"records": records, "result": result}
        self.stored.add(job, bare(network), info, done)  # before it counts as done in this run
        self.run.finish_network(job.phase, job.name, bare(network), info, done)
        return result

    def _finished(self, job: TrainingJob) -> Trained | None:
        """The network trained by an earlier process of this run, or None."""
        done = network = None
        if self.processes.is_main and (done := self.run.finished(job.phase, job.name)):
            path = self.run.network_path(job.phase, job.name)
            network = self.builder.load(path, job.architecture)
        done, network = self.processes.from_main((done, network))
        if done is None:
            return None
        self.run.adopt_records(done["records"])
        return self._placed(job, network), done["result"]

    def _from_store(self, job: TrainingJob) -> Trained | None:
        """The mentor from the store, measured on this run's images, or None."""
        found = self.stored.find(job)
        if found is None:
            return None
        own, _, kept = found
        network = self._placed(job, own)
        measured = job.result(network, self.evaluate(network, "test"))
        kept["result"] = kept["result"] | measured | {"reused": True}
        kept["records"] = [record | {"name": job.name} for record in kept["records"]]
        self.run.adopt_records(kept["records"])
        self.run.finish_network(job.phase, job.name, own, self._info(job), kept)
        self.notify(f"{label(job.phase, job.name)}: taken from {self.stored.store.folder}")
        return network, kept["result"]

    def _train_epoch(
        self, trainer: Trainer, saver: Saver, teaching: TeachingShares | None
    ) -> tuple[dict[str, Any], Evaluation]:
        """Train and measure the rest of an epoch; return its record and the test measurement."""
        started = time.perf_counter()

        def between_steps() -> None:
            self.progress.advance()
            saver.between_steps()

        try:
            record = trainer.train_epoch(between_steps)
        except UserError as error:
            raise UserError(f"{error}{saver.last_good()}") from None
        for name in self.held_out:  # the test part is the last of them
            watch = teaching.watch if teaching and name == "test" else None
            measured = self.evaluate(trainer.network, name, watch)
            if not math.isfinite(measured.loss):
                raise UserError(
                    f"{trainer.name}, epoch {record['epoch']}: its loss on the {name} images is "
                    f"{measured.loss}: the training diverged; try a lower learning rate"
                    f"{saver.last_good()}"
                )
            record |= {f"{name}_loss": measured.loss, f"{name}_top1": measured.top1}
        if teaching:
            for name, shares in teaching.shares().items():
                record["mentors"][name]["taught"] = shares
        record["seconds"] = time.perf_counter() - started
        return record, measured

    def _training_loader(self, job: TrainingJob) -> Loader:
        training, train_set = job.training(self.recipe), self.sets["train"]
        return self.loaders.open(
            train_set,  # type: ignore[arg-type]  # the loaders are of its kind
            self.processes.share(training.batch_size),
            **self.processes.place,
            mean=self.info.mean,
            std=self.info.std,
            augmentation=training_augmentation(self.recipe.data),
            mixing=training_mixing(training, len(self.info.classes)),
            shuffle=True,
            drop_last=len(train_set) >= training.batch_size,
            seed=job.batch_seed(self.recipe),
            repeat=job.repeat(self.recipe),
            dtype=self.dtype,
        )
