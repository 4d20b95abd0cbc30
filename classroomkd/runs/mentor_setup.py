"""The mentors of a run: networks to train first, or given ones adapted to this run's images."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classroomkd import models
from classroomkd.data.loader import per_channel
from classroomkd.errors import UserError
from classroomkd.files import sha256
from classroomkd.models import NetworkInfo
from classroomkd.models.initial_weights import load_given
from classroomkd.models.layout import Renormalised
from classroomkd.models.network_names import PRETRAINED, is_checkpoint, label, split_entry
from classroomkd.runs.builder import outputs_of
from classroomkd.runs.jobs import TrainingJob
from classroomkd.runs.recipe import MentorConfig, is_given

Channels = tuple[float, float, float]
NOT_NORMALISED: tuple[Channels, Channels] = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
"""The mean and standard deviation of images that are used unchanged."""

_FINE_TUNE = ", or train it on them with a new classifier, as {source: …, weights: …, epochs: 5}"


@dataclass
class Mentor:
    """A mentor by its role in the run, and its ``source``, the name that the recipe has for it.

    ``network`` is None if it is to be trained, and ``info`` if that is not known. ``file`` holds
    the weights of one that is not trained here.
    """

    job: TrainingJob
    source: str
    network: nn.Module | None
    info: NetworkInfo | None
    file: str | None = None

    @property
    def name(self) -> str:
        """Its name, unique in the run."""
        return self.job.name

    @property
    def architecture(self) -> str:
        """What builds its network."""
        return self.job.architecture

    @property
    def called(self) -> str:
        """Its name in messages, with the file that it came from."""
        return f"{self.name} ({self.file})" if self.file else self.name


def find_mentors(
    configs: Sequence[MentorConfig],
    epochs: int,
    notify: Callable[[str], None],
    modules: Mapping[str, nn.Module] = MappingProxyType({}),
) -> list[Mentor]:
    """Name every mentor after its architecture and load those that need no training, on the CPU.

    Those are checkpoints, networks with weights, and pretrained networks of torchvision and timm,
    unless the recipe sets their epochs. The others are to be trained, for ``epochs`` by default.
    ``modules`` are networks given in Python, by their names in the recipe. ``notify`` gets lines
    that say how other tools' files were read.

    Raises UserError for a file that cannot be loaded.
    """
    mentors: list[Mentor] = []
    names: Counter[str] = Counter()
    trained: Counter[tuple[str, int | None]] = Counter()
    for config in configs:
        source = config.source
        found = _found(config, modules, notify)
        called = label(found.architecture) + ("" if config.at is None else f"@{config.at}")
        names[called] += 1
        job = TrainingJob(
            "mentor",
            called if names[called] == 1 else f"{called}-{names[called]}",
            found.architecture,
            at=config.at,
            mean=per_channel(config.mean) if config.mean else None,
            std=per_channel(config.std) if config.std else None,
        )
        if config.epochs is None if source in modules else is_given(config):
            mentors.append(Mentor(job, source, found.network, found.info, found.weights))
            continue
        trained[found.architecture, config.at] += 1
        job = replace(
            job,
            epochs=config.epochs or epochs,
            number=trained[found.architecture, config.at],
            weights=found.weights,
        )
        mentors.append(Mentor(job, source, None, None))
    return mentors


class _Found(NamedTuple):
    """What a mentor in a recipe names: the ``weights`` are a file or "pretrained"."""

    architecture: str
    network: nn.Module | None
    info: NetworkInfo | None
    weights: str | None


def _found(
    config: MentorConfig, modules: Mapping[str, nn.Module], notify: Callable[[str], None]
) -> _Found:
    source, weights = config.source, config.weights
    if source in modules:
        return _Found(source, copy.deepcopy(modules[source]).cpu().eval(), None, weights)
    if is_checkpoint(source):
        network, info, architecture = models.load_network(source, notify=notify)
        return _Found(architecture, network, info, source)
    if is_given(config):
        weights = weights or PRETRAINED
        return _Found(source, *load_given(source, weights, notify), weights)
    return _Found(source, None, None, weights)


def mentor_trainings(mentors: Sequence[Mentor]) -> list[list[TrainingJob]]:
    """The mentors to train, grouped by trainings that are equal except for their last epoch."""
    trainings: dict[TrainingJob, list[TrainingJob]] = {}
    for mentor in mentors:
        if mentor.network is None:
            same = replace(mentor.job, name="", at=None)
            trainings.setdefault(same, []).append(mentor.job)
    return list(trainings.values())


def fit_mentor(
    mentor: Mentor, data: NetworkInfo, example: Tensor, notify: Callable[[str], None]
) -> None:
    """Make a loaded mentor take images normalised as ``data`` says; UserError if it cannot.

    ``example`` is a batch of images like the data's.
    """
    what, info = f"mentor {mentor.called}", mentor.info
    assert mentor.network is not None
    if info and models.is_external(mentor.source) and len(info.classes) == len(data.classes):
        notify(f"{what}: assuming that its classes are the data's, in the same order")
        info = replace(info, classes=data.classes)
    if mentor.job.mean and mentor.job.std:
        info = replace(info or data, mean=mentor.job.mean, std=mentor.job.std)
    mentor.info = info
    mentor.network = fit_to_data(mentor.network, info, data, what, example, _FINE_TUNE)
    if info is None and (data.mean, data.std) != NOT_NORMALISED:
        notify(f"{what} has no mean and std of its own: its images are normalised as the student's")
    elif info and (own := info.image_size) != data.image_size:
        notify(f"{what} was trained on images of {own}×{own} pixels")


def sha256_of(source: str) -> str:
    """The SHA-256 of a checkpoint: a file, or the student's file in a run folder."""
    path, _ = split_entry(source)
    return sha256(models.student_file(path) if path.is_dir() else path)


def weights_digest(weights: str) -> str:
    """The SHA-256 of initial weights in a file; a library's are identified by their name."""
    return weights if weights == PRETRAINED else sha256_of(weights)


@torch.no_grad()
def fit_to_data(
    network: nn.Module,
    own: NetworkInfo | None,
    data: NetworkInfo,
    what: str,
    example: Tensor | None = None,
    otherwise: str = "",
) -> nn.Module:
    """The loaded ``network``, on the CPU, adapted to images normalised as ``data`` says.

    ``own`` is the information in its file; for other tools' files only the number of classes is
    known. ``example`` is a batch of images, if they are not [B, 3, H, W] of the data's size, and
    ``otherwise`` is further advice for a network with other classes.

    Raises UserError, naming the network ``what``, if its classes are not those of the data or it
    cannot process the images.
    """
    if example is None:
        example = torch.zeros(1, 3, data.image_size, data.image_size)
    outputs = outputs_of(network, example, what)
    if outputs != len(data.classes):
        raise UserError(
            f"{what} has {outputs} classes, the data has {len(data.classes)}: "
            f"give a network that was trained on these classes{otherwise}"
        )
    if own is None:
        return network
    for index, (theirs, ours) in enumerate(zip(own.classes, data.classes, strict=True)):
        if theirs != ours:
            raise UserError(
                f"{what} was trained on other classes: class {index} is {theirs!r} there and "
                f"{ours!r} in the data: give a network that was trained on these classes"
            )
    return renormalised(network, data, own.mean, own.std)


def renormalised(
    network: nn.Module, data: NetworkInfo, mean: Channels | None, std: Channels | None
) -> nn.Module:
    """Wrap a network that needs images normalised by ``mean`` and ``std`` for the data's images.

    Returns the network itself if these are None or those of the data.
    """
    if mean is None or std is None or (mean, std) == (data.mean, data.std):
        return network
    own = replace(data, mean=mean, std=std)
    return Renormalised(network, data, own).train(network.training)
