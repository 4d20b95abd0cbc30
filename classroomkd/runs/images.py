"""A recipe's images: their source, split, augmentation and loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from classroomkd.data import (
    NAMED_SOURCES,
    Augmentation,
    ImageFiles,
    ImageSet,
    Loaders,
    Mixing,
    Parts,
    RandomResizedCrop,
    channel_statistics,
    list_parts,
    load_parts,
    split_off,
)
from classroomkd.data.batches import Batches, BatchLoaders
from classroomkd.data.ffcv.beton import MAX_SIDE
from classroomkd.data.loader import per_channel
from classroomkd.errors import UserError
from classroomkd.models import NetworkInfo
from classroomkd.runs.recipe import DataConfig
from classroomkd.training.config import TrainingConfig

Sets = Parts[ImageSet] | Parts[ImageFiles]
AnyPart = ImageSet | ImageFiles | Batches
ImageSets = dict[str, AnyPart]  # "train", "test", and "validation" if there is one

_UP_TO = 256  # the image size up to which photographs of `MAX_SIDE` pixels are large enough


def read_images(data: DataConfig, seed: int, download: str | None = None) -> Sets:
    """The parts of the images, split by ``seed`` if the source has no split.

    They are decoded at ``data.image_size``, or left as files to be cropped and resized. Raises
    UserError as `load_parts` and `list_parts` do, or if the images are no files to crop.
    """
    if data.crop == "resize":
        if data.source in NAMED_SOURCES or download is not None:
            source = download or f"the {data.source}"
            raise UserError(f"{source} are no photographs to crop and resize: take data.crop=pad")
        return list_parts(data.source, seed, data.test_share)
    if data.source in NAMED_SOURCES:
        return Parts(*NAMED_SOURCES[data.source].read(seed, data.test_share))
    return load_parts(
        data.source,
        image_size=data.image_size,
        seed=seed,
        test_share=data.test_share,
        download=download,
    )


def sets_of_run(
    train_set: AnyPart,
    test_set: AnyPart,
    validation_set: AnyPart | None,
    *,
    share: float,
    seed: int,
    world_size: int,
) -> ImageSets:
    """The parts of a run by name.

    Without a ``validation_set`` it is a ``share`` of the training images, by ``seed``; with a share
    of 0 there is none, in any case. Raises UserError if a part cannot be split, or has fewer images
    than there are processes.
    """
    sets = {"train": train_set, "test": test_set}
    if share:
        if validation_set is None:
            if isinstance(train_set, Batches):
                raise UserError("a DataLoader's batches cannot be split: give validation, or 0")
            sets["train"], validation_set = split_off(train_set, share, seed)
        sets["validation"] = validation_set
    for name, images in sets.items():
        if len(images) < world_size:
            raise UserError(
                f"{len(images)} {name} images cannot be shared out among {world_size} processes"
            )
    return sets


def open_loaders(
    backend: str, sets: Sequence[AnyPart], size: int, device: torch.device | str
) -> Loaders | BatchLoaders:
    """Loaders of ``sets`` for networks that take images of ``size`` × ``size`` pixels.

    Raises UserError as `Loaders` does.
    """
    images = [part for part in sets if not isinstance(part, Batches)]
    if len(images) < len(sets):
        return BatchLoaders(device)
    return Loaders(backend, images, device, max_side=max(MAX_SIDE, size * MAX_SIDE // _UP_TO))


def example_of(part: AnyPart, size: int) -> Tensor:
    """Two images like those of a part, [2, …]; photographs are cropped to ``size``."""
    if isinstance(part, Batches):
        return part.example
    height, width = part.images.shape[1:3] if isinstance(part, ImageSet) else (size, size)
    return torch.zeros(2, 3, height, width)


def network_info(architecture: str, data: DataConfig, train_set: AnyPart) -> NetworkInfo:
    """What is to be stored with a network of ``data``: classes, normalisation, image size."""
    if data.mean and data.std:
        mean, std = per_channel(data.mean), per_channel(data.std)
    else:
        assert isinstance(train_set, ImageSet)  # for photographs they are in the recipe
        mean, std = channel_statistics(train_set)
    return NetworkInfo(architecture, train_set.classes, mean, std, data.image_size)


def training_augmentation(data: DataConfig) -> Augmentation | RandomResizedCrop:
    """The augmentation of training images."""
    if data.crop == "resize":
        return RandomResizedCrop(data.image_size, data.flips())
    assert data.padding is not None  # `load_recipe` has filled it in
    return Augmentation(data.padding, data.flips(), data.cutout)


def training_mixing(training: TrainingConfig, num_classes: int) -> Mixing | None:
    """How training images are mixed with each other."""
    if training.mixup or training.cutmix:
        return Mixing(num_classes, training.mixup, training.cutmix)
    return None


def counts(sets: ImageSets, folders: Mapping[str, str]) -> str:
    """A description of the number of images in each part and their source."""
    origins = {name: f" ({folder})" for name, folder in folders.items()}
    split_off = f" (split off {folders['train']})" if folders else ""
    return ", ".join(
        f"{len(sets[name]):,} {name}{origins.get(name, split_off)}"
        for name in ("train", "validation", "test")
        if name in sets
    )
