"""What each command takes. What does the work is imported by the command that runs."""

from __future__ import annotations

import argparse
from typing import Any

from classroomkd import __version__, names
from classroomkd.arguments import (
    COUNT,
    DEFAULT_IMAGE_SIZE,
    DEFAULT_SEED,
    DEFAULT_TEST_SHARE,
    NATURAL,
    PART,
    PHOTO_SIDE,
    PIXELS,
    POSITIVE,
    QUALITY,
    SHARE,
    TEMPERATURE,
    Parser,
    add_device,
    add_run_options,
    command_of,
    not_empty,
    path_option,
)


def make_parser() -> Parser:
    """The parser of the whole command line; a command's function is its ``run``."""
    parser = Parser(
        prog="classroomkd",
        description="Distil a student network from several mentors.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"classroomkd {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, what: str) -> Parser:
        return command_of(commands, "classroomkd.training.commands", name, what)

    quickstart = command(
        "quickstart",
        "train three mentors and a student on scikit-learn's handwritten digits, on the CPU",
    )
    quickstart.add_argument(
        "--epochs",
        type=COUNT,
        default=12,
        metavar="N",
        help="of student and teacher (default: %(default)s); the peers get a third and a fifth",
    )
    add_run_options(quickstart, "quickstart")

    train = command("train", "train mentors and a student on your own images")
    _add_recipe_options(train)
    add_run_options(train, "train")
    train.add_argument(
        "--resume",
        type=path_option,
        default=None,
        metavar="DIR",
        help="go on with the run in this folder, whatever stopped it; takes no other option",
    )

    mentors = command_of(
        commands,
        "classroomkd.reproduce.commands",
        "mentors",
        "train only the mentors of a recipe that are not in the store yet",
    )
    _add_recipe_options(mentors)
    add_run_options(mentors, "mentors")
    mentors.add_argument(
        "--at-once",
        type=COUNT,
        default=1,
        metavar="N",
        help="train so many side by side on the device, a process each, which serves GPUs that one "
        "of them does not fill; with --out the same command goes on where it ended, without it the "
        "folder goes when all are in the store (default: 1)",
    )

    evaluate = command("evaluate", "measure a trained student on held-out images")
    evaluate.add_argument(
        "student",
        type=path_option,
        metavar="STUDENT",
        help="a run folder, a .safetensors file or another checkpoint; FILE:ENTRY of several in it",
    )
    evaluate.add_argument(
        "--data",
        type=path_option,
        metavar="PATH",
        help=f"{_DATA_HELP} (default: the images of the run folder STUDENT lies in)",
    )
    own = "(default: that of the run folder STUDENT lies in, else {})"
    evaluate.add_argument(
        "--seed", type=NATURAL, metavar="N", help=f"of the split {own.format(DEFAULT_SEED)}"
    )
    evaluate.add_argument(
        "--test-share",
        type=SHARE,
        metavar="SHARE",
        help=f"held out if there is neither test/ nor val/ {own.format(DEFAULT_TEST_SHARE)}",
    )
    evaluate.add_argument(
        "--crop",
        choices=("pad", "resize"),
        help="resize: photographs, of which the centre is measured; pad: images decoded at one "
        f"size {own.format('pad')}",
    )
    evaluate.add_argument(
        "--all", action="store_true", help="measure every image, those of the training part too"
    )
    add_device(evaluate)

    report = command("report", "write the page of a run, or one that compares several")
    report.add_argument(
        "runs", type=path_option, nargs="+", metavar="RUN", help="run folders, finished or not"
    )
    report.add_argument(
        "--out",
        type=path_option,
        metavar="FILE.html",
        help="(default: RUN/report.html; of several runs ./comparison.html)",
    )

    _add_reproduce(commands)

    def listing(name: str, what: str) -> Parser:
        return command_of(commands, "classroomkd.listings", name, what)

    listing("recipes", "list the packaged recipes")
    listing("models", "list the networks of the zoo and how many parameters they have")
    listing("methods", "list the methods of distillation with their options")
    listing("config", "list every key of a recipe with its value and meaning").add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a YAML file, or one that comes along, whose values to show in place of the defaults",
    )

    data = commands.add_parser("data", help=_DATA_COMMANDS, description=_DATA_COMMANDS)
    _add_data_commands(data.add_subparsers(metavar="command", required=True))
    return parser


def _add_recipe_options(parser: Parser) -> None:
    """What makes a recipe. None has a default, for those are the recipe's."""
    parser.more_help = names.networks
    parser.keys = names.keys
    parser.intermixed = True
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # of the networks' lines
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        "override",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="any value of the recipe, by its dotted name, like training.weight_decay=1e-4 or "
        "method=kd (classroomkd config lists them all, classroomkd methods the methods)",
    )
    parser.add_argument(
        "--recipe",
        type=path_option,
        metavar="NAME|FILE",
        help="to begin with: a YAML file, or one that comes along (classroomkd recipes lists them)",
    )
    parser.add_argument("--data", type=path_option, metavar="PATH", help=_DATA_HELP)
    parser.add_argument("--student", metavar="NAME", help="the network to train, see below")
    parser.add_argument(
        "--mentors",
        nargs="+",
        metavar="NAME|FILE",
        help="networks to train first, pretrained ones, or checkpoints, see below",
    )
    parser.add_argument(
        "--epochs",
        type=COUNT,
        metavar="N",
        help="of the student, and of mentors that no --recipe says otherwise of (default: 240)",
    )
    parser.add_argument("--mentor-epochs", type=COUNT, metavar="N", help="(default: --epochs)")
    parser.add_argument("--batch-size", type=COUNT, metavar="N", help="(default: 64)")
    parser.add_argument(
        "--learning-rate",
        type=POSITIVE,
        metavar="RATE",
        help="the highest of the student's schedule (default: 0.05)",
    )
    parser.add_argument(
        "--temperature",
        type=TEMPERATURE,
        metavar="T",
        help="softens a lesson by 1 + T · the mentor's lead over the student (default: 12)",
    )
    parser.add_argument(
        "--ranking",
        choices=("sample", "batch"),
        help="rank the mentors for each image or for a whole batch (default: sample)",
    )
    parser.add_argument(
        "--image-size",
        type=PIXELS,
        metavar="PIXELS",
        help=f"width and height that images are brought to (default: {DEFAULT_IMAGE_SIZE})",
    )
    parser.add_argument(
        "--test-share",
        type=SHARE,
        metavar="SHARE",
        help=f"held out if there is neither test/ nor val/ (default: {DEFAULT_TEST_SHARE})",
    )
    parser.add_argument(
        "--validation",
        type=PART,
        metavar="SHARE",
        help="of the training images, split off to choose on, unless val/ lies beside test/, whose "
        "images are then chosen on; 0 does neither (default: 0.1)",
    )
    parser.add_argument(
        "--download", choices=("cifar10", "cifar100"), help="fetch this set into PATH first"
    )
    parser.add_argument(
        "--no-flip",
        dest="flip",
        action="store_false",
        help="do not mirror training images (letters, signs); of digits that is the default",
    )
    add_device(parser)


def _add_reproduce(commands: Any) -> None:
    what = "run the students of a table, and write it with the published numbers beside"
    parser = command_of(commands, "classroomkd.reproduce.commands", "reproduce", what)
    parser.keys = names.keys_of_tables
    parser.intermixed = True
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # of the names' lines
    parser.more_help = names.variants
    parser.add_argument(
        "table",
        metavar="TABLE",
        choices=("main", "ablation", "methods", "temperature", "peers", "multi-teacher"),
        help="%(choices)s",
    )
    parser.add_argument(
        "override",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="for every run, a value of its recipe, by its dotted name; on a CPU that has several "
        "runs at once threads=1",
    )
    parser.add_argument("--data", type=path_option, metavar="PATH", help=_DATA_HELP)
    parser.add_argument(
        "--seeds",
        type=NATURAL,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="of the students; they share their mentors (default: 0 1 2)",
    )
    parser.add_argument(
        "--epochs",
        type=COUNT,
        metavar="N",
        help="of the students; their schedules and the mentors' are scaled (default: the recipe's)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help="variants of the table, see below, or other methods, in place of all its variants",
    )
    parser.add_argument(
        "--classrooms",
        nargs="+",
        default=[],
        metavar="NAME|FILE",
        help="recipes in place of the table's own (classroomkd recipes lists what comes along)",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        default=None,
        metavar="NAME",
        help="one run at a time on each, like cuda:0 cuda:1; one that is named twice has two "
        "(default: cuda if there is one, or cpu)",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="only the I-th, from 1, of N parts of the runs, and the mentors that it needs; parts "
        "that share --out merge by themselves, and so do their run folders when copied together",
    )
    parser.add_argument("--out", type=path_option, metavar="DIR", help="(default: reproduce/TABLE)")
    parser.add_argument(
        "--plan", action="store_true", help="show what is done and what is left, and run nothing"
    )


def _add_data_commands(commands: Any) -> None:
    def command(name: str, what: str) -> Parser:
        return command_of(commands, "classroomkd.data.commands", name, what)

    def add_loading(parser: Parser) -> None:
        parser.add_argument(
            "--image-size",
            type=PIXELS,
            metavar="PIXELS",
            help="width and height that images are brought to "
            f"(default: {DEFAULT_IMAGE_SIZE}; digits 16)",
        )
        parser.add_argument(
            "--test-share",
            type=SHARE,
            default=DEFAULT_TEST_SHARE,
            metavar="SHARE",
            help=f"held out if there is neither test/ nor val/ {_DEFAULT}",
        )
        parser.add_argument(
            "--seed",
            type=NATURAL,
            default=DEFAULT_SEED,
            metavar="N",
            help=f"of that split {_DEFAULT}",
        )

    def add_packing(parser: Parser) -> None:
        parser.add_argument(
            "--part",
            choices=("train", "validation", "test", "all"),
            default="train",
            help=_DEFAULT,
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
        "source", type=not_empty, metavar="SOURCE", help=f"{_DATA_HELP}, or a .beton file"
    )
    add_loading(info)
    info.add_argument(
        "--contact-sheet",
        type=path_option,
        metavar="OUT.png",
        help="draw images of the first classes into this file",
    )

    pack = command("pack", "write a part of a data set into a .beton file, the format of FFCV")
    pack.add_argument("source", type=not_empty, metavar="SOURCE", help=_DATA_HELP)
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
_DATA_HELP = (
    "class folders under train/ and test/ or val/ (or all three: val/ is to choose on), or in one "
    "folder to be split by seed, "
    "or CIFAR's python files, or the word digits"
)
