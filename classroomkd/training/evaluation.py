"""Measure a network on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from classroomkd.data import CentreCrop, ImageFiles, ImageSet, Loader, Loaders
from classroomkd.data.batches import Batches, BatchLoaders
from classroomkd.errors import UserError
from classroomkd.loss.methods.classroom import Classroom
from classroomkd.models import NetworkInfo
from classroomkd.training.distributed import Processes

_BATCH_SIZE = 256  # affects only speed and memory
_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """The measures of a network. Accuracies are fractions 0..1.

    ``top5`` counts the best min(5, C) classes. ``loss`` is the mean cross-entropy in nats over
    ``images`` images. ``per_class`` is the top-1 per class (None for a class without images).
    ``calibration_error`` is the expected calibration error with 15 bins of equal width (Guo et al.,
    "On calibration of modern neural networks", section 2).
    """

    top1: float
    top5: float
    loss: float
    images: int
    calibration_error: float
    per_class: list[float | None]


def evaluation_loader(
    loaders: Loaders | BatchLoaders,
    image_set: ImageSet | ImageFiles | Batches,
    info: NetworkInfo,
    **share: int,
) -> Loader:
    """Every image (the centre of a photograph) once, in order, normalised according to ``info``.

    ``share`` is the ``rank`` and ``world_size`` of this process, if there are several.
    """
    return loaders.open(
        image_set,  # type: ignore[arg-type]  # the loaders are of its kind
        _BATCH_SIZE,
        mean=info.mean,
        std=info.std,
        augmentation=evaluation_crop(image_set, info.image_size),
        shuffle=False,
        drop_last=False,
        **share,
    )


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: Loader,
    processes: Processes | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Evaluation:
    """Run ``network`` in eval mode once over ``loader``; the host waits only at the end.

    With several processes, each passes its share of the images and gets the result for all images.
    ``watch`` is called with the logits [B, C], float32, and targets [B] of every batch.
    """
    network.eval()
    sums = bins = classes = torch.zeros(())
    images_seen = 0
    for images, targets, _ in loader:
        logits = network(images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        if watch:
            watch(logits, targets)
        sums = sums + torch.stack([best[:, 0].sum(), best.sum(), loss]).double()
        hits, probabilities = best[:, 0].double(), logits.softmax(1).amax(1).double()
        which = (probabilities.nan_to_num(0.0) * _BINS).long().clamp_(max=_BINS - 1)
        bins = bins + _sums_by(which, _BINS, probabilities, hits)
        classes = classes + _sums_by(targets, logits.shape[1], torch.ones_like(hits), hits)
        images_seen += len(targets)
    if processes is not None and processes.together:
        seen = torch.tensor(float(images_seen), device=sums.device)
        for values in (sums, bins, classes, seen):
            processes.sum(values)
        images_seen = int(seen.item())
    top1, top5, loss = (sums / images_seen).tolist()
    gap = (bins[0] - bins[1]).abs().sum().item() / images_seen
    per_class = [hits / count if count else None for count, hits in classes.T.tolist()]
    return Evaluation(top1, top5, loss, images_seen, gap, per_class)


def _sums_by(which: Tensor, count: int, *values: Tensor) -> Tensor:
    """The sums [V, count] of V arrays [B] over the images with each value of ``which`` [B]."""
    zeros = torch.zeros(count, dtype=torch.float64, device=which.device)
    return torch.stack([zeros.index_add(0, which, value) for value in values])


class TeachingShares:
    """Per class, the share of held-out images on which each mentor would teach the student.

    ``method`` applies its knowledge filter as in training. The mentors run once over the images,
    and only their confidence and correctness are kept. After that an epoch costs no more than the
    student's evaluation, whose logits are passed to `watch`.
    """

    def __init__(
        self,
        method: Classroom,
        mentors: Mapping[str, nn.Module],
        loader: Loader,
        processes: Processes,
    ) -> None:
        self._method, self._mentors, self._loader = method, mentors, loader
        self._processes = processes
        self._standings: list[tuple[Tensor, Tensor]] = []  # of each mentor, both [N]
        self._own: list[tuple[Tensor, Tensor]] = []  # of the student, per batch
        self._targets: list[Tensor] = []

    def watch(self, logits: Tensor, targets: Tensor) -> None:
        """Add the student's logits [B, C] and targets [B] for the next images of an evaluation."""
        self._own.append(self._method.standing(logits, targets))
        self._targets.append(targets)

    @torch.no_grad()
    def shares(self) -> dict[str, list[float | None]]:
        """The share per class of each mentor, rounded to 4 digits; None for a class without images.

        The shares refer to the evaluation since the last call. The first call runs the mentors over
        the images, in eval mode.
        """
        if not self._standings:
            self._standings = self._of_mentors()
        own, targets = _joined(self._own), torch.cat(self._targets)
        self._own, self._targets = [], []
        group = dist.group.WORLD if self._processes.together else None
        active = self._method.teaches(own, self._standings, group).double()
        counts = _sums_by(targets, self._classes, torch.ones_like(active[0]), *active)
        images, *taught = self._processes.sum(counts).tolist()
        return {
            name: [round(a / n, 4) if n else None for a, n in zip(rows, images, strict=True)]
            for name, rows in zip(self._mentors, taught, strict=True)
        }

    def _of_mentors(self) -> list[tuple[Tensor, Tensor]]:
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._mentors]
        for network in self._mentors.values():
            network.eval()
        for images, targets, _ in self._loader:
            for batches, mentor in zip(found, self._mentors.values(), strict=True):
                logits = mentor(images)
                self._classes = logits.shape[1]
                batches.append(self._method.standing(logits, targets))
        return list(map(_joined, found))


def _joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    confidences, correct = zip(*batches, strict=True)
    return torch.cat(confidences), torch.cat(correct)


def require_finite(measured: Evaluation, what: str) -> None:
    """Raise UserError, naming the network ``what``, if its loss is not finite."""
    if not math.isfinite(measured.loss):
        raise UserError(
            f"{what}: its loss on the images is {measured.loss}: use another checkpoint"
        )


def evaluation_crop(image_set: ImageSet | ImageFiles | Batches, size: int) -> CentreCrop | None:
    """The crop of photographs for evaluation; None for images of one size."""
    return CentreCrop(size) if isinstance(image_set, ImageFiles) else None
