"""The command line. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classroomkd import __version__
from classroomkd.arguments import (
    COUNT,
    NATURAL,
    PART,
    PHOTO_SIDE,
    PIXELS,
    POSITIVE,
    QUALITY,
    SHARE,
    TEMPERATURE,
    Parser,
    not_empty,
    path_option,
)
from classroomkd.errors import UserError

if TYPE_CHECKING:
    from classroomkd.data import ImageSet
    from classroomkd.training.classroom import Classroom, ClassroomConfig

_SEED, _TEST_SHARE, _IMAGE_SIZE = 0, 0.2, 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit status.

    0 is success, 2 a mistake of the user's or a refusal of the system's, told in one line on
    stderr, 130 an interruption (143 by SIGTERM), 141 that nobody reads the output any more.
    """
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, head for one, has seen enough
        # What is left in the buffer must go somewhere, or Python complains of it at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as error:
        message = _system_message(error) if isinstance(error, OSError) else str(error)
        print(f"classroomkd: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or "nothing was written"
        print(f"classroomkd: interrupted: {reason}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    return 0


def _system_message(error: OSError) -> str:
    message = error.strerror or str(error)
    if error.filename:
        message = f"{error.filename}: {message}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message += ": free some space and start again; what was written before is intact"
    return message


def _quickstart(arguments: argparse.Namespace) -> None:
    from classroomkd.training.classroom import Classroom, ClassroomConfig
    from classroomkd.training.mentors import MentorConfig

    epochs = arguments.epochs
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
        test_share=1 / 3,
        seed=arguments.seed,
        loader=arguments.loader,
        # Networks this small gain little from a second thread, but on a machine that is busy they
        # lose most of their speed waiting for it; and so the numbers do not depend on the cores.
        threads=1,
    )
    _hold(Classroom(config, _console()), arguments.out, "quickstart")


def _train(parser: Parser, arguments: argparse.Namespace) -> None:
    given = {
        f"--{name.replace('_', '-')}"
        for name, value in vars(arguments).items()
        if name != "run" and value != parser.get_default(name)
    }
    if arguments.resume is not None:
        others = ", ".join(sorted(given - {"--resume"}))
        if others:
            parser.error(f"--resume takes all other options from the run: leave out {others}")
        _resume(arguments.resume)
        return
    missing = [option for option in ("--data", "--student", "--mentors") if option not in given]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")

    import torch

    from classroomkd.training.classroom import Classroom, ClassroomConfig
    from classroomkd.training.machine import find_device
    from classroomkd.training.mentors import MentorConfig, is_checkpoint

    mentor_epochs = arguments.mentor_epochs or arguments.epochs
    config = ClassroomConfig(
        data=str(arguments.data.expanduser().absolute()),
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
        validation=arguments.validation,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        temperature=arguments.temperature,
        ranking=arguments.ranking,
        seed=arguments.seed,
        device=str(find_device(arguments.device)),
        loader=arguments.loader,
        threads=torch.get_num_threads(),
    )
    _hold(Classroom(config, _console()), arguments.out, "train", download=arguments.download)


def _hold(
    classroom: Classroom, out: Path | None, default_out: str, download: str | None = None
) -> None:
    """Train and report; the folder is looked at before the data, which may take long to read."""
    from classroomkd.training.run import choose_folder

    out = choose_folder(out, default_out)
    _report(classroom, classroom.run(*_read_data(classroom.config, download), out), out)


def _resume(out: Path) -> None:
    """Go on with the run in ``out``."""
    from classroomkd.training.classroom import Classroom, ClassroomConfig
    from classroomkd.training.run import recorded_config

    try:
        config = ClassroomConfig.from_dict(recorded_config(out))
    except (TypeError, KeyError) as error:
        raise UserError(f"{out / 'config.yaml'} is not this version's: {error}") from None
    classroom = Classroom(config, _console())
    _report(classroom, classroom.run(*_read_data(config), out, resume=True), out)


def _read_data(config: ClassroomConfig, download: str | None = None) -> tuple[ImageSet, ImageSet]:
    from classroomkd.data import digits, load_source

    split = {"seed": config.seed, "test_share": config.test_share}
    if config.data == "digits":
        return digits(**split)
    return load_source(config.data, image_size=config.image_size, download=download, **split)


def _report(classroom: Classroom, summary: dict[str, Any], out: Path) -> None:
    from classroomkd.report import results_table

    classroom.console.print(results_table(summary))
    classroom.console.print(
        f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from classroomkd.data import Loaders, channel_statistics, is_split_by_seed, join, load_source
    from classroomkd.models import NetworkInfo, load_network
    from classroomkd.training.evaluation import evaluate, evaluation_loader, require_finite
    from classroomkd.training.machine import find_device
    from classroomkd.training.mentors import fit_to_data

    device = find_device(arguments.device)
    network, info, architecture = load_network(arguments.student)
    image_size = info.image_size if info else _IMAGE_SIZE
    split = _split(arguments, ours=info is not None)
    train_set, test_set = load_source(arguments.data, image_size=image_size, **split)
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
    images = join(train_set, test_set) if arguments.all else test_set
    with evaluation_loader(Loaders("resident", [images], device), images, info) as loader:
        result = evaluate(network, loader)
    require_finite(result, str(arguments.student))
    part = "all images" if arguments.all else "the held-out part"
    print(f"{architecture} of {arguments.student} on {part} of {arguments.data}:")
    chosen = ""
    if not arguments.all and is_split_by_seed(arguments.data):
        total = len(train_set) + len(test_set)
        chosen = f" of {total} (held out by seed {split['seed']}; --all measures every image)"
    print(f"images  {result.images}{chosen}")
    print(f"top-1   {result.top1:.2%}")
    print(f"top-5   {f'{result.top5:.2%}' if len(info.classes) > 5 else '–'}")
    print(f"loss    {result.loss:.4f}")
    print(f"calibration error {result.calibration_error:.4f}")


def _split(arguments: argparse.Namespace, ours: bool) -> dict[str, Any]:
    """The seed and share of the split, by default those of the run that ``ours`` comes from.

    With any others a network would be measured on images that it was trained on.
    """
    from classroomkd.training.run import recorded_split

    split = {"seed": _SEED, "test_share": _TEST_SHARE}
    if ours:
        split |= recorded_split(arguments.student)
    given = {name: getattr(arguments, name) for name in split}
    return split | {name: value for name, value in given.items() if value is not None}


def _console() -> Any:
    from rich.console import Console

    return Console()


def _parser() -> Parser:
    parser = Parser(
        prog="classroomkd",
        description="Distil a student network from several mentors.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"classroomkd {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], what: str) -> Parser:
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
        type=COUNT,
        default=12,
        metavar="N",
        help="of student and teacher (default: %(default)s); the peers get a third and a fifth",
    )
    _add_run_options(quickstart, "quickstart")

    train = command("train", _train, "train mentors and a student on your own images")
    train.set_defaults(run=partial(_train, train))
    train.lists_zoo = True
    train.add_argument("--data", type=path_option, metavar="PATH", help=_DATA_HELP)
    train.add_argument("--student", metavar="NAME", help="a network of the zoo, see below")
    train.add_argument(
        "--mentors",
        nargs="+",
        metavar="NAME|FILE",
        help="networks of the zoo, which are trained first, or checkpoints and run folders",
    )
    train.add_argument("--epochs", type=COUNT, default=240, metavar="N", help=_OF_STUDENT)
    train.add_argument("--mentor-epochs", type=COUNT, metavar="N", help="(default: --epochs)")
    train.add_argument("--batch-size", type=COUNT, default=64, metavar="N", help=_DEFAULT)
    train.add_argument(
        "--learning-rate",
        type=POSITIVE,
        default=0.05,
        metavar="RATE",
        help=f"where the schedules begin {_DEFAULT}",
    )
    train.add_argument(
        "--temperature",
        type=TEMPERATURE,
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
        type=PIXELS,
        default=_IMAGE_SIZE,
        metavar="PIXELS",
        help=f"width and height that images are brought to {_DEFAULT}",
    )
    train.add_argument(
        "--test-share",
        type=SHARE,
        default=_TEST_SHARE,
        metavar="SHARE",
        help=f"held out of a data set without test/ and val/ {_DEFAULT}",
    )
    train.add_argument(
        "--validation",
        type=PART,
        default=0.1,
        metavar="SHARE",
        help=f"of the training images, split off to choose on; 0 trains on all of them {_DEFAULT}",
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
    train.add_argument(
        "--resume",
        type=path_option,
        metavar="DIR",
        help="go on with the run in this folder, whatever stopped it; takes no other option",
    )

    evaluate = command("evaluate", _evaluate, "measure a trained student on held-out images")
    evaluate.add_argument(
        "student",
        type=path_option,
        metavar="STUDENT",
        help="a run folder, a .safetensors file or another checkpoint",
    )
    evaluate.add_argument(
        "--data", type=path_option, required=True, metavar="PATH", help=_DATA_HELP
    )
    own = "(default: that of the run folder STUDENT lies in, else {})"
    evaluate.add_argument(
        "--seed", type=NATURAL, metavar="N", help=f"of the split {own.format(_SEED)}"
    )
    evaluate.add_argument(
        "--test-share",
        type=SHARE,
        metavar="SHARE",
        help=f"held out of a data set without test/ and val/ {own.format(_TEST_SHARE)}",
    )
    evaluate.add_argument(
        "--all", action="store_true", help="measure every image, those of the training part too"
    )
    _add_device(evaluate)

    data = commands.add_parser("data", help=_DATA_COMMANDS, description=_DATA_COMMANDS)
    _add_data_commands(data.add_subparsers(metavar="command", required=True))
    return parser


def _add_data_commands(commands: Any) -> None:
    def command(name: str, what: str) -> Parser:
        def run(arguments: argparse.Namespace) -> None:
            from classroomkd.data import commands as functions

            getattr(functions, name)(arguments)

        added = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    def add_loading(parser: Parser) -> None:
        parser.add_argument(
            "--image-size",
            type=PIXELS,
            metavar="PIXELS",
            help=f"width and height that images are brought to (default: {_IMAGE_SIZE}; digits 16)",
        )
        parser.add_argument(
            "--test-share",
            type=SHARE,
            default=_TEST_SHARE,
            metavar="SHARE",
            help=f"held out of a data set without test/ and val/ {_DEFAULT}",
        )
        parser.add_argument(
            "--seed", type=NATURAL, default=_SEED, metavar="N", help=f"of that split {_DEFAULT}"
        )

    def add_packing(parser: Parser) -> None:
        parser.add_argument(
            "--part", choices=("train", "test", "all"), default="train", help=_DEFAULT
        )
        add_loading(parser)
        parser.add_argument(
            "--photos", action="store_true", help="images keep their shapes and become JPEGs"
        )
        parser.add_argument(
            "--max-side",
            type=PHOTO_SIDE,
            metavar="PIXELS",
            help="photos with a longer side are shrunk to it (default: 500)",
        )
        parser.add_argument(
            "--quality", type=QUALITY, metavar="N", help="of their JPEGs, 1 to 100 (default: 90)"
        )
        parser.add_argument("--raw", action="store_true", help="photos as pixels, not as JPEGs")

    info = command("info", "show the classes, counts, sizes and statistics of a data set")
    info.add_argument(
        "source", type=not_empty, metavar="SOURCE", help=f"{_SOURCE_HELP}, or a .beton file"
    )
    add_loading(info)
    info.add_argument(
        "--contact-sheet",
        type=path_option,
        metavar="OUT.png",
        help="draw images of the first classes into this file",
    )

    pack = command("pack", "write a part of a data set into a .beton file, the format of FFCV")
    pack.add_argument("source", type=not_empty, metavar="SOURCE", help=_SOURCE_HELP)
    pack.add_argument("out", type=path_option, metavar="OUT.beton")
    add_packing(pack)
    pack.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")

    verify = command("verify", "check a .beton file against its checksum and its source")
    verify.add_argument("file", type=path_option, metavar="FILE.beton")
    verify.add_argument(
        "source",
        type=not_empty,
        nargs="?",
        metavar="SOURCE",
        help="what it was packed from, to be compared in every pixel; with the same options",
    )
    add_packing(verify)


_DATA_COMMANDS = "look at data sets, pack them into .beton files, check those"
_DEFAULT = "(default: %(default)s)"
_OF_STUDENT = f"of the student {_DEFAULT}"
_DATA_HELP = (
    "class folders under train/ and test/ or val/, or in one folder to be split by seed, "
    "or CIFAR's python files"
)
_SOURCE_HELP = f"{_DATA_HELP}, or the word digits"


def _add_run_options(parser: Parser, name: str) -> None:
    parser.add_argument("--seed", type=NATURAL, default=_SEED, metavar="N", help=_DEFAULT)
    parser.add_argument(
        "--loader",
        choices=("auto", "ffcv", "resident", "torch"),
        default="auto",
        help="what feeds the images, each with the same bits (default: auto: ffcv where it is "
        "installed, else resident where they fit in memory, else torch)",
    )
    parser.add_argument(
        "--out",
        type=path_option,
        metavar="DIR",
        help=f"run folder (default: runs/{name}, or -2, -3, …)",
    )


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", metavar="NAME", help="(default: cuda if there is one, or cpu)")
