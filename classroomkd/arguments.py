"""What the command lines are made of: the parser, and the values its options take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from classroomkd.errors import UserError

DEFAULT_SEED, DEFAULT_TEST_SHARE, DEFAULT_IMAGE_SIZE = 0, 0.2, 32


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as every other mistake of the user's."""

    lists_zoo = False
    intermixed = False  # positional arguments that come in several places, before and after options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # which comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        if self.lists_zoo:
            from classroomkd.models import names

            self.epilog = f"networks of the zoo: {', '.join(names())}"
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
POSITIVE = _checked(float, lambda value: 0 < value < math.inf, "a number above 0")
TEMPERATURE = _checked(float, lambda value: 0 < value <= 1e6, "a number above 0, at most 1e6")
PIXELS = _checked(int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024")
PHOTO_SIDE = _checked(int, lambda value: 1 <= value <= 4096, "a whole number from 1 to 4096")
QUALITY = _checked(int, lambda value: 1 <= value <= 100, "a whole number from 1 to 100")
SHARE = _checked(float, lambda value: 0 < value < 1, "a number between 0 and 1")
PART = _checked(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings within mappings, of dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return result


def not_empty(text: str) -> str:
    """The text of an argument, which as a path would be this folder if it were empty."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not empty")
    return text


def path_option(text: str) -> Path:
    """A path as an option gives it."""
    return Path(not_empty(text))
