"""The training loop of a network, with or without mentors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from classroomkd.data import Loader
from classroomkd.errors import UserError
from classroomkd.loss.methods import Method, Outputs
from classroomkd.loss.methods.base import valid_rows
from classroomkd.models.stages import StageOutputs, shapes_of
from classroomkd.training.config import TrainingConfig
from classroomkd.training.distributed import Processes
from classroomkd.training.graph import CapturedStep
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.mentor_cache import CachedMentors
from classroomkd.training.schedule import learning_rate

READ_EVERY = 50  # steps between checks of the sums on the device


class Trainer:
    """Trains ``network`` with ``method`` by SGD.

    A step does not wait for the device: losses and hits are summed there and checked every 50
    steps, and the learning rate is a tensor. On a GPU the step, mentors and optimizer included, is
    captured in a CUDA graph after a few steps (``cuda_graph``) and replayed from then on.

    Args:
        network: maps images [B, 3, H, W] to logits [B, C]; trained in place, on its device.
        loader: training batches on the network's device.
        training: epochs, schedule and optimizer settings.
        name: the network's name in error messages.
        peak: the schedule's highest learning rate.
        method: the distillation method.
        mentors: on the same device; None for a method without mentors. Cached ones run outside
            the step, if at all.
        image_size: height and width of the images, for methods that use features.
        example: a batch of images like the loader's, if they are not [B, 3, H, W] of that size.
        dtype: torch.bfloat16 for a forward pass under autocast.
        cuda_graph: False to launch every kernel of every step on a GPU.
        compile: pass the network through ``torch.compile``.
        processes: processes that train the network together, each on its share of every batch; the
            gradient is that of the mean over the valid rows of all processes.
    """

    def __init__(
        self,
        network: nn.Module,
        loader: Loader,
        training: TrainingConfig,
        *,
        name: str,
        peak: float,
        method: Method,
        mentors: MentorBank | CachedMentors | None = None,
        image_size: int = 32,
        example: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        cuda_graph: bool = True,
        compile: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.network = network
        self.loader = loader
        self.training = training
        self.name = name
        self.peak = peak
        self.mentors = mentors
        self.dtype = dtype
        self.device = next(network.parameters()).device
        self.method = method
        self._stages = (
            StageOutputs(network, method.student_layers) if method.uses_features else None
        )
        if self._stages:
            images = torch.zeros(1, 3, image_size, image_size) if example is None else example
            self._show_features(self._stages, images.to(self.device))
        method.to(self.device)
        self.processes = processes or Processes(self.device)
        together = self.processes.together
        self.epoch, self.batch = 1, 0  # of the next step
        self.learning_rate = torch.tensor(peak, device=self.device)
        self._parameters = [*network.parameters(), *method.parameters()]
        self.optimizer = torch.optim.SGD(
            _parameter_groups(self._parameters, training),
            lr=self.learning_rate,
            momentum=training.momentum,
            nesterov=training.nesterov,
            fused=True,
        )
        # Images, images of batches whose loss was not finite, loss and hits. If the method reports
        # on mentors: task loss, confidence, and four numbers per mentor.
        size = 4 + (2 + 4 * len(mentors or ()) if method.reports else 0)
        self.sums = torch.zeros(size, dtype=torch.float64, device=self.device)
        self._read = torch.zeros_like(self.sums, device="cpu", pin_memory=self._on_gpu)
        self._fetched: torch.cuda.Event | None = None
        compiled = cast(nn.Module, torch.compile(network)) if compile else network
        self._forward = self.processes.wrap(compiled)
        captured = self._on_gpu and cuda_graph and not together
        self._step_on = CapturedStep(self._step) if captured else self._step

    @torch.no_grad()
    def _show_features(self, stages: StageOutputs, images: Tensor) -> None:
        """Pass the shapes of the features to the method, which may create parameters."""
        self.network.eval()(images)
        assert not isinstance(self.mentors, CachedMentors)  # which have no features
        mentors = self.mentors(images) if self.mentors else []
        self.method.prepare(shapes_of(stages.take()), [shapes_of(m.features) for m in mentors])

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def train_epoch(self, on_step: Callable[[], None] | None = None) -> dict[str, Any]:
        """Train from the current position to the end of the epoch, and return its record.

        ``train_loss`` and ``train_top1`` are means over the epoch's images at the time of their
        step; for a mixed image, top-1 is the share of the predicted class in it.
        ``images_per_second`` excludes evaluation. The method "classroom" adds ``task_loss``,
        ``student_confidence`` and, for each mentor, the means of the loss's report over the epoch;
        ``kl`` is the mean over the rows that the mentor taught, 0 if there were none. ``on_step``
        is called after each step, when the trainer's state can be saved.

        Raises UserError, naming the batch and the cause, if the loss is not finite.
        """
        epoch, steps = self.epoch, len(self.loader)
        first_rate = learning_rate(self.training, self.peak, epoch - 1)
        self.network.train()
        images_seen, last_rate, started = 0, None, time.perf_counter()
        for images, targets, *logits in self._batches(self.batch):
            epochs_done = epoch - 1 + self.batch / steps
            rate = learning_rate(self.training, self.peak, epochs_done)
            if rate != last_rate:  # saves a launch per step
                self.learning_rate.fill_(rate)
                last_rate = rate
            self._step_on(images, targets, *logits)
            self.batch += 1
            images_seen += len(targets)
            if self.batch % READ_EVERY == 0:
                self._check_sums()
            if on_step:
                on_step()
        sums = self._total_sums().tolist()  # the only wait for the device in an epoch
        self._require_finite(sums)
        record = {
            "epoch": epoch,
            "epochs": self.training.epochs,
            "learning_rate": first_rate,
            "train_loss": sums[2] / sums[0],
            "train_top1": sums[3] / sums[0],
            "images_per_second": images_seen
            * self.processes.world_size
            / (time.perf_counter() - started),
        }
        if self.method.reports:
            record |= self._classroom_record([value / sums[0] for value in sums[4:]])
        self.sums.zero_()
        self.epoch, self.batch = epoch + 1, 0
        return record

    def _batches(self, first: int) -> Iterator[tuple[Tensor, ...]]:
        """The epoch's batches from ``first`` on: images, targets, and cached mentors' logits."""
        self.loader.set_epoch(self.epoch, first)
        cached = self.mentors if isinstance(self.mentors, CachedMentors) else None
        if cached:
            cached.begin(self.loader.augmentation_epoch, self.loader.upcoming())
        for images, targets, _ in self.loader:
            yield images, targets, *(cached.next(images) if cached else ())

    def _step(self, images: Tensor, targets: Tensor, *cached: Tensor) -> None:
        """Take one optimizer step and add its statistics to ``sums``.

        ``cached`` are the logits of the mentors, if these are not to be run.
        """
        mixed = self.dtype != torch.float32
        # A captured step must not rely on cached casts from before the capture.
        with torch.autocast(self.device.type, self.dtype, enabled=mixed, cache_enabled=False):
            logits = self._forward(images)
        student = Outputs(logits, self._stages.take() if self._stages else ())
        mentors = self._outputs(images, cached)
        scale = self._scale(targets) if self.processes.together else None
        loss, report = self.method.backward(student, mentors, targets, scale)
        self.processes.average_gradients(self.method.parameters())
        if self.training.clip_norm is not None:  # all processes have the same gradient here
            nn.utils.clip_grad_norm_(self._parameters, self.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        top1 = _hits(logits.detach(), targets).double().mean()
        means = [torch.stack([torch.ones_like(top1), ~loss.isfinite(), loss, top1])]
        if report is not None:
            means += [
                torch.stack([report.task_loss, report.student_confidence]),
                report.active_share,
                report.rank_weight,
                report.temperature,
                report.kl * report.active_share,  # mean over all rows, so that batches add up
            ]
        self.sums.add_(torch.cat([mean.double() for mean in means]), alpha=len(targets))

    def _outputs(self, images: Tensor, cached: Sequence[Tensor]) -> list[Outputs]:
        if self.mentors is None or isinstance(self.mentors, CachedMentors):
            return list(map(Outputs, cached))
        return self.mentors(images)

    def _scale(self, targets: Tensor) -> Tensor:
        """The factor from a mean over this process's valid rows to one over those of all.

        Gradients of R processes are averaged: n · R / N for n valid rows here and N in all.
        """
        n = valid_rows(targets).sum().float()
        return n * self.processes.world_size / self.processes.sum(n.clone()).clamp(min=1)

    def _total_sums(self) -> Tensor:
        return self.processes.sum(self.sums.clone())

    def _check_sums(self) -> None:
        """Check the sums fetched before, and fetch new ones without waiting for them."""
        if self._fetched is None or self._fetched.query():
            self._require_finite(self._read.tolist())
            self._read.copy_(self._total_sums(), non_blocking=True)
            if self._on_gpu:
                self._fetched = torch.cuda.current_stream(self.device).record_event()

    def require_finite(self) -> None:
        """Wait for the device and raise UserError if a loss of this epoch was not finite."""
        self._require_finite(self._total_sums().tolist())

    def _require_finite(self, sums: list[float]) -> None:
        images, nonfinite = sums[:2]
        if nonfinite:
            # Weights that are not finite stay so: the batches counted are the last ones.
            together = self.loader.batch_size * self.processes.world_size
            first = min(round((images - nonfinite) / together), len(self.loader) - 1)
            raise UserError(
                f"{self.name}, epoch {self.epoch}, batch {first + 1} of {len(self.loader)}: "
                f"the loss is not finite: {self._culprit(first)}"
            )

    def _classroom_record(self, means: list[float]) -> dict[str, Any]:
        task_loss, student_confidence, *values = means
        names = self.mentors.names if self.mentors else []
        mentors = {}
        for index, name in enumerate(names):
            active, weight, temperature, kl = values[index :: len(names)]
            mentors[name] = {
                "active_share": active,
                "rank_weight": weight,
                "temperature": temperature,
                "kl": kl / active if active else 0.0,
            }
        return {
            "task_loss": task_loss,
            "student_confidence": student_confidence,
            "mentors": mentors,
        }

    def _culprit(self, batch: int) -> str:
        # Mentors are frozen and a batch can be drawn again, so their logits are checked only after
        # a loss was not finite, at no cost for other steps. A logit of −inf excludes a class.
        images, _, *cached = next(self._batches(batch))
        if self.mentors:
            for name, mentor in zip(self.mentors.names, self._outputs(images, cached), strict=True):
                if (mentor.logits.isnan() | mentor.logits.isposinf()).any():
                    return f"neither are the logits of mentor {name}; remove or replace it"
        return "the training diverged; try a lower learning rate"

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on. All processes must call it after the same step."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self._total_sums(),
            "model": self.network.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self._on_gpu else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a ``state_dict``; must be called before the first step."""
        self.epoch, self.batch = state["epoch"], state["batch"]
        if self.processes.is_main:  # the saved sums are those of all processes
            self.sums.copy_(state["sums"])
        self.network.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        torch.set_rng_state(state["random"])
        if self._on_gpu and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """The correctness of each prediction, [B]: 0 or 1, or the predicted class's probability."""
    predicted = logits.argmax(1)
    if targets.dim() == 2:
        return targets.gather(1, predicted[:, None])[:, 0]
    return predicted == targets


def _parameter_groups(
    parameters: Sequence[nn.Parameter], training: TrainingConfig
) -> list[dict[str, Any]]:
    """All parameters, with those without weight decay (norms and biases) in a second group."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        is_vector = parameter.ndim <= 1 and not training.decay_norms_and_biases
        (others if is_vector else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": training.weight_decay}]
    return groups + ([{"params": others, "weight_decay": 0.0}] if others else [])
