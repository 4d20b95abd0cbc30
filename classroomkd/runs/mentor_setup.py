"""The mentors of a run: networks to train first, or checkpoints made fit for this run's images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from classroomkd import models
from classroomkd.errors import UserError
from classroomkd.models import NetworkInfo
from classroomkd.models.network_names import is_checkpoint, split_entry
from classroomkd.runs.jobs import TrainingJob
from classroomkd.runs.recipe import MentorConfig


@dataclass
class Mentor:
    """A mentor by its ``name``, unique in the run; ``network`` is None until it is trained.

    ``source`` is the recipe's word for it. If it is trained here its schedule is made for
    ``epochs``, and it is taken from epoch ``at`` if that is not None; else both are None.
    """

    name: str
    source: str
    architecture: str
    epochs: int | None
    at: int | None
    network: nn.Module | None
    info: NetworkInfo | None


def find_mentors(
    configs: Sequence[MentorConfig], epochs: int, notify: Callable[[str], None]
) -> list[Mentor]:
    """Name every mentor after its architecture and load those that are checkpoints, on the CPU.

    Networks of torchvision and timm bring their pretrained weights, unless they have epochs of
    their own. The others are to be trained for ``epochs``, if they do not say otherwise themselves.
    ``notify`` is told how other tools' files were read.

    Raises UserError for a file that cannot be loaded, or that is given epochs.
    """
    mentors: list[Mentor] = []
    taken: Counter[str] = Counter()
    for config in configs:
        source, network, info, architecture = config.source, None, None, config.source
        length: int | None = config.epochs or epochs
        if is_checkpoint(source):
            if config.epochs is not None or config.at is not None:
                raise UserError(f"mentor {source} is trained already: give it no epochs")
            network, info, architecture = models.load_network(source, notify=notify)
            length = None
        elif models.is_external(source) and config.epochs is None and config.at is None:
            network, info = models.load_pretrained(source)
            length = None
        called = architecture if config.at is None else f"{architecture}@{config.at}"
        taken[called] += 1
        name = called if taken[called] == 1 else f"{called}-{taken[called]}"
        mentors.append(Mentor(name, source, architecture, length, config.at, network, info))
    return mentors


def check_trainable(name: str, image_size: int, batch_size: int) -> None:
    """Raise UserError if the zoo has no network ``name`` or it cannot train on such batches.

    Nothing is computed: the network is built and run on the meta device.
    """
    with torch.device("meta"):
        network = models.create(name, 2)
        images = torch.empty(min(batch_size, 2), 3, image_size, image_size)
    try:
        network(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{name} cannot train on images of {image_size}×{image_size} pixels in batches of "
            f"{batch_size} ({error}): choose a larger --image-size or --batch-size"
        ) from None


def mentor_trainings(mentors: Sequence[Mentor]) -> list[list[TrainingJob]]:
    """The mentors to train, those of the same training, but for its last epoch, together."""
    counts: Counter[tuple[str, int | None]] = Counter()
    trainings: dict[tuple[str, int | None, int], list[TrainingJob]] = {}
    for mentor in mentors:
        if mentor.network is None:
            kind = mentor.architecture, mentor.at
            counts[kind] += 1
            number = counts[kind]
            job = TrainingJob(
                "mentor", mentor.name, mentor.architecture, mentor.epochs, mentor.at, number
            )
            trainings.setdefault((mentor.architecture, mentor.epochs, number), []).append(job)
    return list(trainings.values())


def fit_mentor(mentor: Mentor, data: NetworkInfo, notify: Callable[[str], None]) -> None:
    """Make a loaded mentor take images normalised as ``data`` says; UserError if it cannot."""
    what, info = f"mentor {mentor.source}", mentor.info
    assert mentor.network is not None
    if info and models.is_external(mentor.source) and len(info.classes) == len(data.classes):
        notify(f"{what}: its classes are taken to be the data's, in their order")
        mentor.info = info = replace(info, classes=data.classes)
    mentor.network = fit_to_data(mentor.network, info, data, what)
    if info is None:
        notify(f"{what} does not say how to normalise; it gets what this data has")
    elif (own := info.image_size) != data.image_size:
        notify(f"{what} was trained on images of {own}×{own} pixels")


def sha256_of(source: str) -> str:
    """The SHA-256 of a checkpoint, a file or the student's in a run folder."""
    path, _ = split_entry(source)
    with (models.student_file(path) if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def fit_to_data(
    network: nn.Module, own: NetworkInfo | None, data: NetworkInfo, what: str
) -> nn.Module:
    """The loaded ``network``, on the CPU, made to take images normalised as ``data`` says.

    ``own`` is what its file says of it; of a foreign file only the number of classes is known.

    Raises UserError, calling the network ``what``, if it has other classes than the data or
    cannot take its images.
    """
    size = data.image_size
    try:
        outputs = network(torch.zeros(1, 3, size, size)).shape[1]
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{what} cannot take images of {size}×{size} pixels ({error}): "
            "choose another --image-size"
        ) from None
    if outputs != len(data.classes):
        raise UserError(
            f"{what} tells {outputs} classes apart, the data has {len(data.classes)}: "
            "give a network that was trained on these classes"
        )
    if own is None:
        return network
    for index, (theirs, ours) in enumerate(zip(own.classes, data.classes, strict=True)):
        if theirs != ours:
            raise UserError(
                f"{what} was trained on other classes: class {index} is {theirs!r} there and "
                f"{ours!r} in the data: give a network that was trained on these classes"
            )
    if (own.mean, own.std) == (data.mean, data.std):
        return network
    return Renormalised(network, data, own).eval()


class Renormalised(nn.Module):
    """Takes images normalised as ``data`` says to a network that wants them as ``own`` says.

    Maps images [B, 3, H, W] to logits [B, C].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, data: NetworkInfo, own: NetworkInfo) -> None:
        super().__init__()
        self.network = network
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1)
            for values in (data.mean, data.std, own.mean, own.std)
        )
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.network(torch.addcmul(self.shift, images, self.scale))
