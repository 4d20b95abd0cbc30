"""`classroomkd evaluate`: the accuracy of a trained network on held-out images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from classroomkd.cli.arguments import (
    DATA_HELP,
    DEFAULT_IMAGE_SIZE,
    DEFAULT_SEED,
    DEFAULT_TEST_SHARE,
    NATURAL,
    SHARE,
    add_command,
    add_device,
    path_option,
)
from classroomkd.cli.checks import require_checkpoint, require_images
from classroomkd.errors import UserError


def add_to(commands: Any) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands, evaluate, "measure the accuracy of a trained network on held-out images"
    )
    parser.add_argument(
        "student",
        type=path_option,
        metavar="STUDENT",
        help="run folder, .safetensors file or another checkpoint; FILE:ENTRY picks one of several "
        "networks in a file",
    )
    parser.add_argument(
        "--data",
        type=path_option,
        metavar="PATH",
        help=f"{DATA_HELP} (default: the images of STUDENT's run)",
    )
    own = "(default: that of STUDENT's run, else {})"
    parser.add_argument(
        "--seed",
        type=NATURAL,
        metavar="N",
        help=f"seed of the train–test split {own.format(DEFAULT_SEED)}",
    )
    parser.add_argument(
        "--test-share",
        type=SHARE,
        metavar="SHARE",
        help=f"share to hold out if there is no test/ or val/ {own.format(DEFAULT_TEST_SHARE)}",
    )
    parser.add_argument(
        "--crop",
        choices=("pad", "resize"),
        help="resize: take the centre of each photograph; pad: all images have one size "
        f"{own.format('pad')}",
    )
    parser.add_argument(
        "--all", action="store_true", help="measure on every image, including the training set"
    )
    add_device(parser)


def evaluate(arguments: argparse.Namespace) -> None:
    """Print accuracy, loss and calibration error."""
    require_checkpoint(str(arguments.student))
    source = _source(arguments)

    from classroomkd.data import ImageSet, channel_statistics, is_split_by_seed, join
    from classroomkd.models import NetworkInfo, load_network
    from classroomkd.models.layout import to_channels_last
    from classroomkd.runs.images import open_loaders, read_images
    from classroomkd.runs.machine import find_device
    from classroomkd.runs.mentor_setup import fit_to_data
    from classroomkd.runs.recipe import DataConfig
    from classroomkd.training.evaluation import evaluate as measure
    from classroomkd.training.evaluation import evaluation_loader, require_finite

    device = find_device(arguments.device)
    network, info, architecture = load_network(arguments.student, notify=print)
    image_size = info.image_size if info else DEFAULT_IMAGE_SIZE
    if info is None and arguments.data is None:
        raise UserError(
            f"{arguments.student} lies in a run folder but was not written by the run: give --data"
        )
    split = _split(arguments, ours=info is not None)
    photos, loader = split.pop("crop") == "resize", split.pop("loader")
    if photos and info is None:
        raise UserError(
            f"{arguments.student} does not say how its images were prepared: only images that are "
            "decoded at one size can tell, without --crop resize"
        )
    data = DataConfig(source, image_size, test_share=split["test_share"])
    data.crop = "resize" if photos else "pad"
    sets = read_images(data, split["seed"])
    train_set, test_set = sets.train, sets.test
    if info is None:
        assert isinstance(train_set, ImageSet)  # as the check of --crop sees to
        info = NetworkInfo(
            architecture, test_set.classes, *channel_statistics(train_set), image_size
        )
        print(
            f"{arguments.student} does not say how its images were prepared: taking the mean and "
            f"deviation of {source}'s training part, {image_size}×{image_size} pixels"
        )
    fit_to_data(network, info, replace(info, classes=test_set.classes), str(arguments.student))
    to_channels_last(network, device)
    images = join(*sets.sets().values()) if arguments.all else test_set
    loaders = open_loaders(loader, [images], image_size, device)
    with evaluation_loader(loaders, images, info) as batches:
        result = measure(network, batches)
    require_finite(result, str(arguments.student))
    own = ", as in its run" if arguments.data is None else ""
    part = "all images" if arguments.all else "the held-out part"
    print(f"{architecture} of {arguments.student} on {part} of {source}{own}:")
    chosen = ""
    if not arguments.all and is_split_by_seed(source):
        total = len(train_set) + len(test_set)
        chosen = f" of {total} (held out by seed {split['seed']}; --all measures every image)"
    print(f"images  {result.images}{chosen}")
    print(f"top-1   {result.top1:.2%}")
    print(f"top-5   {f'{result.top5:.2%}' if len(info.classes) > 5 else '–'}")
    print(f"loss    {result.loss:.4f}")
    print(f"calibration error {result.calibration_error:.4f}")


def _source(arguments: argparse.Namespace) -> str:
    """The given images, or those of the run that the network comes from."""
    from classroomkd.data import NAMED_SOURCES
    from classroomkd.runs.paths import recorded_source

    if arguments.data is not None:
        require_images(str(arguments.data))
        return str(arguments.data)
    source = recorded_source(arguments.student)
    if not source:
        arguments.parser.error(
            f"--data is required: {arguments.student} lies in no run folder that names its images"
        )
    if source not in NAMED_SOURCES and not Path(source).exists():
        raise UserError(f"the images of the run are no longer at {source}: give --data")
    return source


def _split(arguments: argparse.Namespace, ours: bool) -> dict[str, Any]:
    """Seed, share and crop of the split and the loader; by default the run's, if it is ``ours``.

    With another split a network would be measured on images that it was trained on. Loaders differ
    in how they resize photographs, so those are loaded as in the run.
    """
    from classroomkd.runs.paths import recorded_split

    split = {"seed": DEFAULT_SEED, "test_share": DEFAULT_TEST_SHARE, "crop": "pad"}
    recorded = recorded_split(arguments.student) if ours else {}
    loader = recorded.pop("loader", "auto")
    split |= recorded
    given = {name: getattr(arguments, name) for name in split}
    split |= {name: value for name, value in given.items() if value is not None}
    return split | {"loader": loader if split["crop"] == "resize" else "resident"}
