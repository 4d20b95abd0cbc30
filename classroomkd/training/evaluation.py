"""Measuring a network on held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from classroomkd.data import ImageSet, Loader, Loaders
from classroomkd.errors import UserError
from classroomkd.models import NetworkInfo

_BATCH_SIZE = 256  # changes speed and memory only


@dataclass(frozen=True)
class Evaluation:
    """Accuracies are fractions 0..1; ``top5`` counts the best min(5, C) classes.

    ``loss`` is the mean cross entropy in nats over the ``images`` seen.
    """

    top1: float
    top5: float
    loss: float
    images: int


def evaluation_loader(loaders: Loaders, image_set: ImageSet, info: NetworkInfo) -> Loader:
    """Every image once, in order, normalised by the statistics of ``info``."""
    return loaders.open(
        image_set,
        _BATCH_SIZE,
        mean=info.mean,
        std=info.std,
        augmentation=None,
        shuffle=False,
        drop_last=False,
    )


@torch.no_grad()
def evaluate(network: nn.Module, loader: Loader) -> Evaluation:
    """Run ``network``, in eval mode, once over ``loader``; the host waits once, at the end."""
    network.eval()
    sums, images_seen = 0.0, 0
    for images, targets, _ in loader:
        logits = network(images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums = sums + torch.stack([best[:, 0].sum(), best.sum(), loss]).double()
        images_seen += len(targets)
    top1, top5, loss = (sums / images_seen).tolist()
    return Evaluation(top1, top5, loss, images_seen)


def require_finite(measured: Evaluation, what: str) -> None:
    """Raise UserError, calling the network ``what``, if its loss is not finite."""
    if not math.isfinite(measured.loss):
        raise UserError(
            f"{what}: its loss on the images is {measured.loss}: take another checkpoint"
        )
