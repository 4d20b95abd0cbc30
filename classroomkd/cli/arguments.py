"""The argument parser of every command, and the types of option values."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, get_args

from classroomkd.errors import UserError
from classroomkd.limits import LARGEST_SIDE, Backend

DEFAULT_SEED, DEFAULT_TEST_SHARE, DEFAULT_IMAGE_SIZE = 0, 0.2, 32
DATA_HELP = (
    "class folders under train/ and test/ or val/ (with all three, val/ is the validation set), "
    "class folders in one folder, split by seed, CIFAR's Python files, or the word digits"
)


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong command line, with a hint at the probable intention."""

    intermixed = False  # whether positional arguments may stand between options
    more_help: Callable[[], str] | None = None  # the end of the help, made on demand
    keys: Callable[[str], list[str]] | None = None  # recipe keys that an option may mean
    _parsing = False

    def take_keys(self, keys: Callable[[str], list[str]], more_help: Callable[[], str]) -> None:
        """Accept KEY=VALUE between options, and end the help with ``more_help``, line by line."""
        self.keys, self.more_help, self.intermixed = keys, more_help, True
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._parsing:  # called again by parse_known_intermixed_args
            return super().parse_known_args(args, namespace)
        args = sys.argv[1:] if args is None else list(args)
        self._parsing = True
        parse = self.parse_known_intermixed_args if self.intermixed else super().parse_known_args
        try:
            namespace, unknown = parse(args, namespace)
        finally:
            self._parsing = False
        if unknown:  # reported here, where the command is known
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown[0], args)}")
        return namespace, unknown

    def _hint(self, unknown: str, args: Sequence[str]) -> str:
        """The end of the error message: what an unknown option probably means."""
        option, equals, value = unknown.partition("=")
        if not option.startswith("--"):
            return ""
        known = difflib.get_close_matches(option, self._option_string_actions, n=1, cutoff=0.8)
        name = option.removeprefix("--").replace("-", "_")
        keys = self.keys(name) if self.keys else []
        if keys and (not known or keys[0].split(".")[-1] == name.split(".")[-1]):
            if not equals:
                following = args[args.index(unknown) + 1 :]
                value = next((text for text in following[:1] if not text.startswith("-")), "VALUE")
            return f": recipe values are given as {' or '.join(f'{k}={value}' for k in keys)}"
        return f": did you mean {known[0]}?" if known else ""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        if self.more_help:
            self.epilog = self.more_help()
        return super().format_help()


def _checked(convert: type, holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with suppress(ValueError):
            if holds(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")

    return parse


COUNT = _checked(int, lambda value: value >= 1, "a whole number of at least 1")
NATURAL = _checked(int, lambda value: value >= 0, "a whole number of at least 0")
PIXELS = _checked(
    int, lambda value: 1 <= value <= LARGEST_SIDE, f"a whole number from 1 to {LARGEST_SIDE}"
)
PHOTO_SIDE = _checked(int, lambda value: 1 <= value <= 4096, "a whole number from 1 to 4096")
QUALITY = _checked(int, lambda value: 1 <= value <= 100, "a whole number from 1 to 100")
SHARE = _checked(float, lambda value: 0 < value < 1, "a number between 0 and 1")


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a mapping with dotted names into nested mappings."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return result


def not_empty(text: str) -> str:
    """Check that an argument is not empty: as a path that would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not empty")
    return text


def path_option(text: str) -> Path:
    """The type of options that take a path."""
    return Path(not_empty(text))


def add_command(
    commands: Any, function: Callable[[argparse.Namespace], int | None], what: str
) -> Parser:
    """Add a command named after ``function``, which runs it."""
    parser = commands.add_parser(function.__name__, help=what, description=what, allow_abbrev=False)
    parser.set_defaults(run=function, parser=parser)
    return parser


def add_run_options(parser: Parser, name: str) -> None:
    """Add --seed, --loader and --out; without defaults where the parser's options have none."""
    none = parser.argument_default
    parser.add_argument(
        "--seed",
        type=NATURAL,
        default=none or DEFAULT_SEED,
        metavar="N",
        help=f"random seed (default: {DEFAULT_SEED})",
    )
    parser.add_argument(
        "--loader",
        choices=get_args(Backend),
        default=none or "auto",
        help="image loader; all give the same bits (default: auto: ffcv if installed, else "
        "resident if the images fit in memory, else torch)",
    )
    parser.add_argument(
        "--out",
        type=path_option,
        default=None,
        metavar="DIR",
        help=f"run folder to create (default: runs/{name}, then runs/{name}-2, …)",
    )


def add_image_size(parser: Parser, default: object = DEFAULT_IMAGE_SIZE) -> None:
    """Add --image-size, which is None if it is not given; ``default`` says what it is then."""
    parser.add_argument(
        "--image-size",
        type=PIXELS,
        metavar="PIXELS",
        help=f"width and height that images are resized to (default: {default})",
    )


def add_loading(parser: Parser, run: str = "") -> None:
    """Add --image-size, --test-share and --seed; their defaults may be those of a ``run``."""
    own = f"that of {run}, else " if run else ""
    size = DEFAULT_IMAGE_SIZE if run else f"{DEFAULT_IMAGE_SIZE}; digits 16"
    add_image_size(parser, f"{own}{size}")
    parser.add_argument(
        "--test-share",
        type=SHARE,
        default=None if run else DEFAULT_TEST_SHARE,
        metavar="SHARE",
        help=f"share to hold out if there is no test/ or val/ (default: {own}{DEFAULT_TEST_SHARE})",
    )
    parser.add_argument(
        "--seed",
        type=NATURAL,
        default=None if run else DEFAULT_SEED,
        metavar="N",
        help=f"seed of that split (default: {own}{DEFAULT_SEED})",
    )


def add_download(parser: Parser, place: str) -> None:
    parser.add_argument(
        "--download",
        choices=("cifar10", "cifar100"),
        help=f"download this data set into {place} first",
    )


def add_device(parser: Parser) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if available)"
    )
