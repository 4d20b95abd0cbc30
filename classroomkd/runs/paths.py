"""Choose the folder of a new run, and read the settings of an existing one."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from classroomkd.errors import UserError


def choose_folder(out: Path | None, default: str) -> Path:
    """``out``; if None, the first of runs/``default``, -2, -3, … that does not exist.

    Raises UserError if ``out`` is not empty or cannot be written to.
    """
    if out is None:
        names = (default if number == 1 else f"{default}-{number}" for number in count(1))
        out = next(path for path in (Path("runs") / name for name in names) if not path.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "is not empty" if out.is_dir() else "is a file"
        raise UserError(f"{out} {kind}: give --out a new folder, so that no run overwrites another")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write to {out}: {existing} is not a folder to write to")
    return out


def unfinished(run: Path) -> Path:
    """The config.yaml of a run that has not finished.

    Raises UserError if ``run`` is not a run folder, or the run is finished.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"there is no run to resume in {run}: it has no config.yaml")
    if (run / "summary.json").exists():
        raise UserError(
            f"the run in {run} is finished: there is nothing to resume (classroomkd report "
            f"{run} writes its page again)"
        )
    return path


def recorded_data(network: Path) -> tuple[str, dict[str, Any]]:
    """``data.source``, and the split, of the run whose folder is or contains ``network``.

    The split has the ``seed`` and ``test_share``; if the run crops photographs, ``crop`` and
    ``loader`` too. Both are empty if there is no such run; other tools' config.yaml, and damaged
    ones, are ignored.
    """
    for folder in (network, *network.absolute().parents[:3]):
        config = None
        with suppress(OSError, yaml.YAMLError):
            config = yaml.safe_load((folder / "config.yaml").read_bytes())
        if isinstance(config, dict):
            data = config["data"] if isinstance(config.get("data"), dict) else {}
            seed, share = data.get("split_seed"), data.get("test_share")
            seed = config.get("seed") if seed is None else seed
            if type(seed) is int and seed >= 0 and isinstance(share, float) and 0 < share < 1:
                photos = data.get("crop") == "resize"
                split = {"seed": seed, "test_share": share} | (
                    {"crop": "resize", "loader": data.get("loader")} if photos else {}
                )
                return str(data.get("source") or ""), split
    return "", {}
