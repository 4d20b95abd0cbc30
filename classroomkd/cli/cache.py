"""`classroomkd cache`: list, verify or remove cached mentors' logits."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classroomkd.cli.arguments import add_command
from classroomkd.errors import UserError


def add_to(commands: Any) -> None:
    what = "list, verify or remove the mentors' logits cached by runs with mentor_cache"
    parser = add_command(commands, cache, what)
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "verify", "remove"),
        default="list",
        help="verify reads everything and exits with status 1 if something is damaged, which the "
        "next run computes again (default: list)",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="names as listed (verify: default all)"
    )
    parser.add_argument(
        "--all", action="store_true", default=False, help="remove everything that is listed"
    )


def cache(arguments: argparse.Namespace) -> int:
    """List, verify or remove. Returns 1 if what was verified is damaged, else 0."""
    from classroomkd.training.logits_files import logits_folder, read_key, remove

    home = logits_folder()
    found = {path.name: path for path in sorted(home.glob("*/"))}
    for name in arguments.names:
        if name not in found:
            raise UserError(f"there is no {name} in {home}: classroomkd cache lists the names")
    if arguments.all and (arguments.action != "remove" or arguments.names):
        arguments.parser.error("--all is for remove, without names")
    chosen = {name: found[name] for name in arguments.names or found}
    if arguments.action == "remove":
        if not (arguments.names or arguments.all):
            arguments.parser.error("give the names to remove, or --all")
        for name, path in chosen.items():
            remove(path)
            print(f"removed: {name}")
        return 0
    if not found:
        print(f"there is nothing in {home}")
    healthy = True
    for name, path in chosen.items():
        if (key := read_key(path)) is None:
            print(f"{name}: empty or damaged: remove it")
        elif arguments.action == "list":
            print(f"{name}: {_contents(path, key)}")
        else:
            healthy &= _verify(path, key)
    return int(not healthy)


def _contents(path: Path, key: Mapping[str, Any]) -> str:
    from classroomkd.report.numbers import counted
    from classroomkd.training.logits_files import size_text

    epochs, images, classes = key["shape"]
    size = sum(file.stat().st_size for file in path.iterdir())
    return (
        f"{key['mentor']}, seed {key['seed']}: {counted(epochs, 'epoch')} of {images:,} images of "
        f"{classes} classes, {key['dtype']}, {size_text(size)}"
    )


def _verify(path: Path, key: Mapping[str, Any]) -> bool:
    """Read all rows in the folder ``path``, print what is there, and return whether it is sound."""
    from classroomkd.training.logits_files import KeptLogits

    try:
        known, damaged = KeptLogits(path, key, joins=False).verify()
    except UserError as error:
        print(f"{path.name}: {error}")
        return False
    epochs, images, _ = key["shape"]
    state = f"{sum(damaged.values()):,} damaged" if damaged else "none damaged"
    print(f"{path.name}: {known:,} of {epochs * images:,} rows stored, {state}")
    for epoch, count in damaged.items():
        print(f"  epoch {epoch}: {count} of {images:,} images are damaged")
    return not damaged
