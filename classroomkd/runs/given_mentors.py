"""Check the given mentors on a few hundred images before training; one line per mentor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from classroomkd.data import ImageFiles, ImageSet
from classroomkd.data.image_sets import select
from classroomkd.models import NetworkInfo
from classroomkd.models.layout import bare, to_channels_last
from classroomkd.runs.images import AnyPart, open_loaders
from classroomkd.runs.mentor_setup import NOT_NORMALISED, Mentor
from classroomkd.training.evaluation import evaluation_loader
from classroomkd.training.mentor_check import CheckedMentor, MentorCheck, check_mentors

N_IMAGES = 400
_FEW = 100
_ON_A_CPU = 128  # of images much larger than CIFAR's
_SMALL = 64  # pixels


def part_to_check(validation: AnyPart | None, test: AnyPart) -> AnyPart:
    """The validation images, or the held-out ones if those are too few and these are more."""
    if validation is None or len(validation) < min(_FEW, len(test)):
        return test
    return validation


def check_given(
    mentors: Sequence[Mentor], part: AnyPart, info: NetworkInfo, device: torch.device
) -> list[MentorCheck]:
    """Check the mentors that have a network, on ``device``, with labelled images of ``part``.

    A few hundred images, the same in every run; fewer if they are large and there is no GPU.
    """
    given = [mentor for mentor in mentors if mentor.network is not None]
    if not given:
        return []
    few = device.type == "cpu" and info.image_size > _SMALL
    images, targets = _images(part, info, device, _ON_A_CPU if few else N_IMAGES)
    not_normalised = (info.mean, info.std) == NOT_NORMALISED
    if not not_normalised:  # then they are normalised images [N, 3, H, W]
        mean, std = (images.new_tensor(of)[:, None, None] for of in (info.mean, info.std))
        images = images * std + mean
    checked = {}
    for mentor in given:
        assert mentor.network is not None
        own = mentor.info or info
        checked[mentor.called] = CheckedMentor(
            to_channels_last(bare(mentor.network), device),
            *((None, None) if not_normalised else (own.mean, own.std)),
        )
    return check_mentors(checked, images, targets, info.classes)


def _images(
    part: AnyPart, info: NetworkInfo, device: torch.device, n_images: int
) -> tuple[Tensor, Tensor]:
    """Randomly drawn images, normalised as ``info`` says, and their classes [N]."""
    if isinstance(part, ImageSet | ImageFiles):
        mask = np.zeros(len(part), bool)
        mask[np.random.default_rng(0).permutation(len(part))[:n_images]] = True
        part = select(part, mask)
    backend = "resident" if isinstance(part, ImageSet) else "torch"
    loaders = open_loaders(backend, [part], info.image_size, device)
    images, targets = [], []
    with evaluation_loader(loaders, part, info) as batches:
        for batch, classes, _ in batches:
            images.append(batch)
            targets.append(classes)
            if sum(map(len, targets)) >= n_images:
                break
    return torch.cat(images)[:n_images], torch.cat(targets)[:n_images]
