"""`classroomkd evaluate`: the accuracy of a trained network on held-out images."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classroomkd.cli.arguments import (
    DATA_HELP,
    DEFAULT_IMAGE_SIZE,
    DEFAULT_SEED,
    DEFAULT_TEST_SHARE,
    add_command,
    add_device,
    add_loading,
    path_option,
)
from classroomkd.cli.checks import require_checkpoint, require_images
from classroomkd.errors import UserError

if TYPE_CHECKING:
    from classroomkd.models import NetworkInfo
    from classroomkd.runs.images import Sets
    from classroomkd.runs.recipe import DataConfig
    from classroomkd.training.evaluation import Evaluation


def add_to(commands: Any) -> None:
    parser = add_command(
        commands, evaluate, "measure the accuracy of a trained network on held-out images"
    )
    parser.add_argument(
        "student",
        type=path_option,
        metavar="STUDENT",
        help="run folder, .safetensors file or another checkpoint; FILE:ENTRY picks one of several "
        "networks in a file; FILE.py:NAME=WEIGHTS is a network of your own with its weights, and "
        "tv:NAME and timm:NAME are pretrained",
    )
    parser.add_argument(
        "--data",
        type=path_option,
        metavar="PATH",
        help=f"{DATA_HELP} (default: the images of STUDENT's run)",
    )
    add_loading(parser, "STUDENT's run")
    parser.add_argument(
        "--crop",
        choices=("pad", "resize"),
        help="resize: take the centre of each photograph; pad: all images have one size "
        "(default: that of STUDENT's run, else pad)",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{what} of each channel, of values scaled to 0..1, that STUDENT's images are "
            "normalised by (default: what its file says, else those of the training part)",
        )
    parser.add_argument(
        "--all", action="store_true", help="measure on every image, including the training set"
    )
    add_device(parser)


def evaluate(arguments: argparse.Namespace) -> None:
    """Print accuracy, loss and calibration error."""
    from classroomkd.models.network_names import PRETRAINED, label
    from classroomkd.runs.paths import recorded_data

    student = str(arguments.student)
    name, weights = _named(student)
    place = Path(student if weights in (None, PRETRAINED) else weights)
    recorded_source, recorded_split = recorded_data(place)
    source = _source(arguments, place, recorded_source)
    _check_normalisation(arguments)

    from classroomkd.data import is_split_by_seed, join
    from classroomkd.data.loader import per_channel
    from classroomkd.models import load_network
    from classroomkd.models.initial_weights import load_given
    from classroomkd.models.layout import to_channels_last
    from classroomkd.runs.images import open_loaders, read_images
    from classroomkd.runs.machine import find_device
    from classroomkd.runs.mentor_setup import fit_to_data
    from classroomkd.runs.recipe import DataConfig
    from classroomkd.training.evaluation import evaluate as measure
    from classroomkd.training.evaluation import evaluation_loader, require_finite

    device = find_device(arguments.device)
    if weights is None:
        network, info, architecture = load_network(student, notify=print)
    else:
        (network, info), architecture = load_given(name, weights, print), name
    if info is None and arguments.data is None:
        raise UserError(
            f"{student} lies in a run folder but was not written by the run: give --data"
        )
    split = _split(arguments, recorded_split if info else {})
    if info is None and split["crop"] == "resize" and arguments.mean is None:
        raise UserError(
            f"{student} does not say how its images were prepared: only for images that are "
            "decoded at one size can tell, without --crop resize; or give --mean and --std"
        )
    data = DataConfig(
        source,
        arguments.image_size or (info.image_size if info else DEFAULT_IMAGE_SIZE),
        test_share=split["test_share"],
        crop=split["crop"],
        mean=arguments.mean,
        std=arguments.std,
    )
    sets = read_images(data, split["seed"])
    info = _fitting(info, data, sets, student, name, architecture)
    fit_to_data(network, info, replace(info, classes=sets.test.classes), student)
    if arguments.mean is not None:
        info = replace(info, mean=per_channel(arguments.mean), std=per_channel(arguments.std))
    to_channels_last(network, device)
    images = join(*sets.sets().values()) if arguments.all else sets.test
    loaders = open_loaders(split["loader"], [images], data.image_size, device)
    with evaluation_loader(loaders, images, info) as batches:
        result = measure(network, batches)
    require_finite(result, student)
    own = ", as in its run" if arguments.data is None else ""
    part = "all images" if arguments.all else "the held-out part"
    print(f"{label(architecture)} of {student} on {part} of {source}{own}:")
    chosen = ""
    if not arguments.all and is_split_by_seed(source):
        total = len(sets.train) + len(sets.test)
        chosen = f" of {total} (held out by seed {split['seed']}; --all measures every image)"
    _print_result(result, len(info.classes), chosen)


def _fitting(
    info: NetworkInfo | None,
    data: DataConfig,
    sets: Sets,
    student: str,
    name: str,
    architecture: str,
) -> NetworkInfo:
    """What is known of a network, completed from the data; what is assumed is printed."""
    from classroomkd.models import is_external
    from classroomkd.runs.images import network_info

    if info is None:
        info = network_info(architecture, data, sets.train)
        if data.mean is None:
            print(
                f"{student} does not say how its images were prepared: using the mean and "
                f"deviation of {data.source}'s training part, {data.image_size}×{data.image_size} "
                "pixels"
            )
    if is_external(name) and len(info.classes) == len(sets.test.classes):
        print(f"{student}: assuming that its classes are the data's, in the same order")
        info = replace(info, classes=sets.test.classes)
    return replace(info, image_size=data.image_size)


def _print_result(result: Evaluation, n_classes: int, chosen: str) -> None:
    print(f"images  {result.images}{chosen}")
    print(f"top-1   {result.top1:.2%}")
    print(f"top-5   {f'{result.top5:.2%}' if n_classes > 5 else '–'}")
    print(f"loss    {result.loss:.4f}")
    print(f"calibration error {result.calibration_error:.4f}")


def _check_normalisation(arguments: argparse.Namespace) -> None:
    if (arguments.mean is None) != (arguments.std is None):
        arguments.parser.error("--mean and --std go together")
    if arguments.std is not None and min(arguments.std) <= 0:
        arguments.parser.error(f"--std must be above 0, not {min(arguments.std)}")


def _named(student: str) -> tuple[str, str | None]:
    """The network and its weights, None if both are in a checkpoint; UserError if unknown."""
    from classroomkd.models.network_names import (
        PRETRAINED,
        code_file,
        is_code,
        is_external,
        split_weights,
    )

    name, weights = split_weights(student)
    if is_external(name) and weights is None:
        weights = PRETRAINED
    if is_code(name):
        code_file(name)
        if weights is None:
            raise UserError(f"{name} has no weights yet: give {name}=FILE")
    if weights != PRETRAINED:
        require_checkpoint(student if weights is None else weights)
    return name, weights


def _source(arguments: argparse.Namespace, network: Path, recorded: str) -> str:
    """The given images, or those ``recorded`` by the run that the network comes from."""
    from classroomkd.data import NAMED_SOURCES

    if arguments.data is not None:
        require_images(str(arguments.data))
        return str(arguments.data)
    if not recorded:
        arguments.parser.error(
            f"--data is required: {network} lies in no run folder that names its images"
        )
    if recorded not in NAMED_SOURCES and not Path(recorded).exists():
        raise UserError(f"the images of the run are no longer at {recorded}: give --data")
    return recorded


def _split(arguments: argparse.Namespace, recorded: dict[str, Any]) -> dict[str, Any]:
    """Seed, share and crop of the split and the loader; by default those ``recorded`` by the run.

    With another split, a network would be measured on its training images. Loaders resize
    photographs differently, so the run's loader is used.
    """
    split = {"seed": DEFAULT_SEED, "test_share": DEFAULT_TEST_SHARE, "crop": "pad"}
    recorded = dict(recorded)
    loader = recorded.pop("loader", "auto")
    split |= recorded
    given = {name: getattr(arguments, name) for name in split}
    split |= {name: value for name, value in given.items() if value is not None}
    return split | {"loader": loader if split["crop"] == "resize" else "resident"}
