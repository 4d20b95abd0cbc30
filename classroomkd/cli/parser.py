"""The parser of the whole command line, built from those of the commands."""

from __future__ import annotations

from classroomkd import __version__
from classroomkd.cli import (
    cache,
    check,
    data,
    evaluate,
    listings,
    mentors,
    quickstart,
    report,
    reproduce,
    train,
)
from classroomkd.cli.arguments import Parser


def make_parser() -> Parser:
    """The parser of the whole command line; a command's function is its ``run``."""
    parser = Parser(
        prog="classroomkd",
        description="Distil a student network from several mentors.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"classroomkd {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    runs = (quickstart, train, mentors, check, evaluate, report, reproduce)
    for module in (*runs, listings, data, cache):
        module.add_to(commands)
    return parser
