"""Measuring a network on held-out images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classroomkd.data import ImageFiles, ImageSet, Loader, Loaders
from classroomkd.errors import UserError
from classroomkd.models import NetworkInfo
from classroomkd.training.distributed import Processes
from classroomkd.training.images import evaluation_crop

_BATCH_SIZE = 256  # changes speed and memory only
_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """Accuracies are fractions 0..1; ``top5`` counts the best min(5, C) classes.

    ``loss`` is the mean cross entropy in nats over the ``images`` seen; ``per_class`` the top-1 of
    each class's images (None of a class without any); ``calibration_error`` the expected
    calibration error over 15 bins of equal width: the mean over the images of how far apart, in the
    bin of a prediction's probability, mean probability and accuracy are. (Guo et al., "On
    calibration of modern neural networks", section 2.)
    """

    top1: float
    top5: float
    loss: float
    images: int
    calibration_error: float
    per_class: list[float | None]


def evaluation_loader(
    loaders: Loaders, image_set: ImageSet | ImageFiles, info: NetworkInfo, **share: int
) -> Loader:
    """Every image, of photographs the centre, once, in order, normalised as ``info`` says.

    ``share`` is the ``rank`` and ``world_size`` of a process among others.
    """
    return loaders.open(
        image_set,
        _BATCH_SIZE,
        mean=info.mean,
        std=info.std,
        augmentation=evaluation_crop(image_set, info.image_size),
        shuffle=False,
        drop_last=False,
        **share,
    )


@torch.no_grad()
def evaluate(network: nn.Module, loader: Loader, processes: Processes | None = None) -> Evaluation:
    """Run ``network``, in eval mode, once over ``loader``; the host waits once, at the end.

    Several processes, each with its share of the images, get the same result, that of them all.
    """
    network.eval()
    sums, bins, classes, images_seen = 0.0, 0.0, 0.0, 0
    for images, targets, _ in loader:
        logits = network(images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
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
    """The sums [V, count] of V arrays [B] over the images that ``which`` puts together."""
    zeros = torch.zeros(count, dtype=torch.float64, device=which.device)
    return torch.stack([zeros.index_add(0, which, value) for value in values])


@torch.no_grad()
def taught(
    student: nn.Module,
    mentors: Mapping[str, nn.Module],
    loader: Loader,
    processes: Processes | None = None,
) -> dict[str, list[float | None]]:
    """For each mentor, class by class, the share of images that it would teach ``student`` on.

    Those are the images whose true class it gives at least the student's probability, which is the
    knowledge filter "better"; None of a class without images. All networks are put in eval mode.
    """
    sums: dict[str, Tensor] = {}
    for network in (student, *mentors.values()):
        network.eval()
    for images, targets, _ in loader:
        own = _log_confidence(student(images), targets)
        for name, mentor in mentors.items():
            logits = mentor(images)
            ahead = (_log_confidence(logits, targets) >= own).double()
            both = _sums_by(targets, logits.shape[1], torch.ones_like(ahead), ahead)
            sums[name] = sums[name] + both if name in sums else both
    if processes is not None:
        sums = {name: processes.sum(both) for name, both in sums.items()}
    return {
        name: [ahead / count if count else None for count, ahead in both.T.tolist()]
        for name, both in sums.items()
    }


def _log_confidence(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(1).gather(1, targets[:, None])[:, 0]


def require_finite(measured: Evaluation, what: str) -> None:
    """Raise UserError, calling the network ``what``, if its loss is not finite."""
    if not math.isfinite(measured.loss):
        raise UserError(
            f"{what}: its loss on the images is {measured.loss}: take another checkpoint"
        )
