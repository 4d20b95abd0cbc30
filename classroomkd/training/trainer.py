"""The one training loop: a network, with mentors or without."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classroomkd.data import Loader
from classroomkd.errors import UserError

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def freeze(network: nn.Module) -> nn.Module:
    """Put ``network`` in eval mode and stop its gradients, as a mentor must be."""
    return network.eval().requires_grad_(False)


class Trainer:
    """Trains ``network`` by SGD on cross entropy, or, given ``mentors``, on ``loss``.

    Args:
        network: maps images [B, 3, H, W] to logits [B, C]; trained in place, where it lies.
        loader: training batches on the network's device.
        name: what error messages call the network.
        epochs: how many epochs the schedule spans.
        schedule: progress (0 before the first epoch, below 1) to learning rate.
        mentors: unique name to network, on the same device; they are frozen.
        loss: a ``ClassroomLoss`` or the like, called with the student's logits, the list of the
            mentors' logits, the targets and ``return_report=True``; needed with mentors.
    """

    def __init__(
        self,
        network: nn.Module,
        loader: Loader,
        *,
        name: str,
        epochs: int,
        schedule: Callable[[float], float],
        mentors: Mapping[str, nn.Module] | None = None,
        loss: nn.Module | None = None,
    ) -> None:
        self.network = network
        self.loader = loader
        self.name = name
        self.epochs = epochs
        self.schedule = schedule
        self.mentors = {name: freeze(mentor) for name, mentor in (mentors or {}).items()}
        self.loss = loss
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            lr=schedule(0.0),
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        )

    def train_epoch(self, epoch: int, on_step: Callable[[], None] | None = None) -> dict[str, Any]:
        """Train one epoch, counted from 1, and return its record.

        ``train_loss`` and ``train_top1`` are means over the images as they were met, and
        ``images_per_second`` counts training alone. With mentors there are also ``task_loss``,
        ``student_confidence`` and, for each mentor, the means over the epoch of what the loss
        reports; ``kl`` is the mean over the rows that the mentor taught, 0 if there were none.
        """
        rate = self.schedule((epoch - 1) / self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        self.loader.set_epoch(epoch)
        sums, images_seen, started = 0.0, 0, time.perf_counter()
        for images, targets, _ in self.loader:
            sums = sums + self._step(images, targets) * len(targets)
            images_seen += len(targets)
            if on_step:
                on_step()
        means = (sums / images_seen).tolist()  # the only wait for the device in an epoch
        record = {
            "epoch": epoch,
            "epochs": self.epochs,
            "learning_rate": rate,
            "train_loss": means[0],
            "train_top1": means[1],
            "images_per_second": images_seen / (time.perf_counter() - started),
        }
        return record | self._classroom_record(means[2:]) if self.mentors else record

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step; returns the batch's means, float64, still on the device."""
        logits = self.network(images)
        if self.mentors:
            loss, report = self.loss(
                logits, self._mentor_logits(images), targets, return_report=True
            )
        else:
            loss, report = F.cross_entropy(logits, targets), None
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        top1 = (logits.detach().argmax(1) == targets).double().mean()
        means = [torch.stack([loss.detach(), top1])]
        if report is not None:
            means += [
                torch.stack([report.task_loss, report.student_confidence]),
                report.active_share,
                report.rank_weight,
                report.temperature,
                report.kl * report.active_share,  # over all rows, so that batches can be added
            ]
        return torch.cat([mean.double() for mean in means])

    @torch.no_grad()
    def _mentor_logits(self, images: Tensor) -> list[Tensor]:
        return [mentor(images) for mentor in self.mentors.values()]

    def _classroom_record(self, means: list[float]) -> dict[str, Any]:
        task_loss, student_confidence, *values = means
        count = len(self.mentors)
        mentors = {}
        for index, name in enumerate(self.mentors):
            active, weight, temperature, kl = values[index::count]
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

    def require_finite(self, record: Mapping[str, Any]) -> None:
        """Raise UserError, naming what was not finite, if the epoch of ``record`` went wrong."""
        for what in ("train_loss", "test_loss"):
            if not math.isfinite(record[what]):
                epoch = record["epoch"]
                raise UserError(
                    f"{self.name}, epoch {epoch}: {what} is {record[what]}: {self._culprit(epoch)}"
                )

    def _culprit(self, epoch: int) -> str:
        # Mentors are frozen and an epoch's batches can be drawn again, so looking for a sick
        # mentor can wait until something went wrong and costs a healthy step nothing. A logit of
        # −inf only rules a class out.
        self.loader.set_epoch(epoch)
        for images, _, _ in self.loader:
            for name, logits in zip(self.mentors, self._mentor_logits(images), strict=True):
                if (logits.isnan() | logits.isposinf()).any():
                    return f"the logits of mentor {name} are not finite; leave it out or replace it"
        return "the training diverged; try a lower learning rate"
