"""The command line. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from classroomkd import __version__
from classroomkd.errors import UserError

if TYPE_CHECKING:
    from classroomkd.data import ImageSet
    from classroomkd.training.classroom import Classroom

_SEED, _TEST_SHARE, _IMAGE_SIZE = 0, 0.2, 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status.

    0 is success, 2 a mistake of the user's, told in one line on stderr, 130 an interruption.
    """
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except UserError as error:
        print(f"classroomkd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"classroomkd: interrupted: {interrupt or 'nothing was written'}", file=sys.stderr)
        return 130
    return 0


def _quickstart(arguments: argparse.Namespace) -> None:
    import torch

    from classroomkd.data import digits
    from classroomkd.training.classroom import Classroom, ClassroomConfig
    from classroomkd.training.mentors import MentorConfig

    # Networks this small gain little from a second thread, but on a machine that is busy they lose
    # most of their speed waiting for it; and so the numbers do not depend on the count of cores.
    torch.set_num_threads(1)
    epochs, test_share = arguments.epochs, 1 / 3
    config = ClassroomConfig(
        data="digits",
        student="resnet8",
        # A teacher, and two peers that are weaker because they are smaller and trained less.
        mentors=(
            MentorConfig("resnet20", epochs),
            MentorConfig("resnet14", max(epochs // 3, 1)),
            MentorConfig("resnet8", max(epochs // 5, 1)),
        ),
        epochs=epochs,
        image_size=16,
        padding=2,
        flip=False,  # a mirrored digit is no digit
        test_share=test_share,
        seed=arguments.seed,
    )
    _hold(
        Classroom(config, _console()),
        lambda: digits(seed=arguments.seed, test_share=test_share),
        arguments.out,
        "quickstart",
    )


def _train(arguments: argparse.Namespace) -> None:
    from classroomkd.data import load_source
    from classroomkd.training.classroom import Classroom, ClassroomConfig
    from classroomkd.training.machine import find_device
    from classroomkd.training.mentors import MentorConfig, is_checkpoint

    mentor_epochs = arguments.mentor_epochs or arguments.epochs
    config = ClassroomConfig(
        data=str(arguments.data),
        student=arguments.student,
        mentors=tuple(
            MentorConfig(source, None if is_checkpoint(source) else mentor_epochs)
            for source in arguments.mentors
        ),
        epochs=arguments.epochs,
        image_size=arguments.image_size,
        padding=arguments.image_size // 8,
        flip=arguments.flip,
        test_share=arguments.test_share,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        temperature=arguments.temperature,
        ranking=arguments.ranking,
        seed=arguments.seed,
        device=str(find_device(arguments.device)),
    )
    _hold(
        Classroom(config, _console()),
        lambda: load_source(
            arguments.data,
            image_size=arguments.image_size,
            seed=arguments.seed,
            test_share=arguments.test_share,
            download=arguments.download,
        ),
        arguments.out,
        "train",
    )


def _hold(
    classroom: Classroom,
    load: Callable[[], tuple[ImageSet, ImageSet]],
    out: Path | None,
    default_out: str,
) -> None:
    """Train and report; the folder is looked at before the data, which may take long to read."""
    from classroomkd.report import results_table
    from classroomkd.training.run import choose_folder

    out = choose_folder(out, default_out)
    summary = classroom.run(*load(), out)
    classroom.console.print(results_table(summary))
    classroom.console.print(
        f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from classroomkd.data import channel_statistics, load_source
    from classroomkd.models import NetworkInfo, load_network
    from classroomkd.training.evaluation import evaluate, evaluation_loader
    from classroomkd.training.machine import find_device
    from classroomkd.training.mentors import fit_to_data

    device = find_device(arguments.device)
    network, info, architecture = load_network(arguments.student)
    image_size = info.image_size if info else _IMAGE_SIZE
    train_set, test_set = load_source(
        arguments.data, image_size=image_size, **_split(arguments, ours=info is not None)
    )
    if info is None:
        info = NetworkInfo(
            architecture, test_set.classes, *channel_statistics(train_set), image_size
        )
        print(
            f"{arguments.student} does not say how its images were prepared: taking the mean and "
            f"deviation of {arguments.data}'s training part, {image_size}×{image_size} pixels"
        )
    fit_to_data(network, info, replace(info, classes=test_set.classes), str(arguments.student))
    network.to(device, memory_format=torch.channels_last)
    with evaluation_loader(test_set, info, device) as loader:
        result = evaluate(network, loader)
    print(f"{architecture} of {arguments.student} on the held-out part of {arguments.data}:")
    print(f"images  {result.images}")
    print(f"top-1   {result.top1:.2%}")
    print(f"top-5   {result.top5:.2%}")
    print(f"loss    {result.loss:.4f}")


def _split(arguments: argparse.Namespace, ours: bool) -> dict[str, Any]:
    """The seed and share of the split, by default those of the run that ``ours`` comes from.

    With any others a network would be measured on images that it was trained on.
    """
    import yaml

    split = {"seed": _SEED, "test_share": _TEST_SHARE}
    for folder in (arguments.student, *arguments.student.absolute().parents[:2]):
        if ours and (folder / "config.yaml").is_file():
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            split = {name: config[name] for name in split}
            break
    given = {name: getattr(arguments, name) for name in split}
    return split | {name: value for name, value in given.items() if value is not None}


def _console() -> Any:
    from rich.console import Console

    return Console()


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as every other mistake of the user's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _checked(convert: type, holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with suppress(ValueError):
            if holds(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")

    return parse


_COUNT = _checked(int, lambda value: value >= 1, "a whole number of at least 1")
_NATURAL = _checked(int, lambda value: value >= 0, "a whole number of at least 0")
_POSITIVE = _checked(float, lambda value: 0 < value < math.inf, "a number above 0")
_SHARE = _checked(float, lambda value: 0 < value < 1, "a number between 0 and 1")


def _parser() -> _Parser:
    parser = _Parser(
        prog="classroomkd",
        description="Distil a student network from several mentors.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"classroomkd {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], what: str) -> _Parser:
        added = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    quickstart = command(
        "quickstart",
        _quickstart,
        "train three mentors and a student on scikit-learn's handwritten digits, on the CPU",
    )
    quickstart.add_argument(
        "--epochs",
        type=_COUNT,
        default=12,
        metavar="N",
        help="of student and teacher (default: %(default)s); the peers get a third and a fifth",
    )
    _add_run_options(quickstart, "quickstart")

    train = command("train", _train, "train mentors and a student on your own images")
    train.add_argument("--data", type=Path, required=True, metavar="PATH", help=_DATA_HELP)
    train.add_argument("--student", required=True, metavar="NAME", help="a network of the zoo")
    train.add_argument(
        "--mentors",
        required=True,
        nargs="+",
        metavar="NAME|FILE",
        help="networks of the zoo, which are trained first, or checkpoints and run folders",
    )
    train.add_argument("--epochs", type=_COUNT, default=240, metavar="N", help=_OF_STUDENT)
    train.add_argument("--mentor-epochs", type=_COUNT, metavar="N", help="(default: --epochs)")
    train.add_argument("--batch-size", type=_COUNT, default=64, metavar="N", help=_DEFAULT)
    train.add_argument(
        "--learning-rate",
        type=_POSITIVE,
        default=0.05,
        metavar="RATE",
        help=f"where the schedules begin {_DEFAULT}",
    )
    train.add_argument(
        "--temperature",
        type=_POSITIVE,
        default=12.0,
        metavar="T",
        help=f"softens a lesson by 1 + T · the mentor's lead over the student {_DEFAULT}",
    )
    train.add_argument(
        "--ranking",
        choices=("sample", "batch"),
        default="sample",
        help=f"rank the mentors for each image or for a whole batch {_DEFAULT}",
    )
    train.add_argument(
        "--image-size",
        type=_COUNT,
        default=_IMAGE_SIZE,
        metavar="PIXELS",
        help=f"width and height that images are brought to {_DEFAULT}",
    )
    train.add_argument(
        "--test-share",
        type=_SHARE,
        default=_TEST_SHARE,
        metavar="SHARE",
        help=f"held out of a data set without test/ and val/ {_DEFAULT}",
    )
    train.add_argument(
        "--download", choices=("cifar10", "cifar100"), help="fetch this set into PATH first"
    )
    train.add_argument(
        "--no-flip",
        dest="flip",
        action="store_false",
        help="do not mirror training images (digits, letters, signs)",
    )
    _add_device(train)
    _add_run_options(train, "train")

    evaluate = command("evaluate", _evaluate, "measure a trained student on held-out images")
    evaluate.add_argument(
        "student",
        type=Path,
        metavar="STUDENT",
        help="a run folder, a .safetensors file or another checkpoint",
    )
    evaluate.add_argument("--data", type=Path, required=True, metavar="PATH", help=_DATA_HELP)
    own = "(default: that of the run folder STUDENT lies in, else {})"
    evaluate.add_argument(
        "--seed", type=_NATURAL, metavar="N", help=f"of the split {own.format(_SEED)}"
    )
    evaluate.add_argument(
        "--test-share",
        type=_SHARE,
        metavar="SHARE",
        help=f"held out of a data set without test/ and val/ {own.format(_TEST_SHARE)}",
    )
    _add_device(evaluate)
    return parser


_DEFAULT = "(default: %(default)s)"
_OF_STUDENT = f"of the student {_DEFAULT}"
_DATA_HELP = (
    "class folders under train/ and test/ or val/, or in one folder to be split by seed, "
    "or CIFAR's python files"
)


def _add_run_options(parser: _Parser, name: str) -> None:
    parser.add_argument("--seed", type=_NATURAL, default=_SEED, metavar="N", help=_DEFAULT)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"run folder (default: runs/{name}, or -2, -3, …)"
    )


def _add_device(parser: _Parser) -> None:
    parser.add_argument("--device", metavar="NAME", help="(default: cuda if there is one, or cpu)")
