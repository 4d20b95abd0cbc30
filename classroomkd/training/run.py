"""The folder that a training run writes."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from classroomkd.errors import UserError
from classroomkd.files import atomic_write
from classroomkd.models import NetworkInfo, save_network
from classroomkd.training.trainer import Trainer


def choose_folder(out: Path | None, default: str) -> Path:
    """``out``, or without it the first of runs/``default``, -2, -3, … that does not exist.

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


def recorded_split(network: Path) -> dict[str, Any]:
    """The ``seed`` and ``test_share`` of the run that ``network``, a file or run folder, lies in.

    Empty if it lies in none: other tools' config.yaml, damaged ones too, count for nothing.
    """
    for folder in (network, *network.absolute().parents[:2]):
        config = None
        if (folder / "config.yaml").is_file():
            with suppress(yaml.YAMLError):
                config = yaml.safe_load((folder / "config.yaml").read_bytes())
        if isinstance(config, dict):
            split = {name: config.get(name) for name in ("seed", "test_share")}
            seed, share = split.values()
            if type(seed) is int and seed >= 0 and isinstance(share, float) and 0 < share < 1:
                return split
    return {}


class Run:
    """Writes one run: its records as they come, and its networks, each file atomically."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        try:
            for folder in (path, path / "checkpoints", path / "mentors"):
                folder.mkdir(parents=True, exist_ok=True)
            (path / "metrics.jsonl").touch(exist_ok=False)  # claims it from a run started beside
            atomic_write(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        except OSError as error:
            raise UserError(
                f"cannot write to {path}: {error.strerror}: choose another --out"
            ) from None

    def record(self, line: Mapping[str, Any]) -> None:
        """Append ``line`` to metrics.jsonl at once; a number that is not finite becomes null."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def save_checkpoint(
        self,
        phase: str,
        name: str,
        trainer: Trainer,
        epoch: int,
        info: NetworkInfo,
    ) -> None:
        """Replace a network's training state by the one after ``epoch`` epochs."""
        buffer = io.BytesIO()
        state = {
            "model": trainer.network.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "epoch": epoch,
            "info": asdict(info),
        }
        torch.save(state, buffer)
        atomic_write(self.path / "checkpoints" / f"{phase}-{name}.pt", buffer.getvalue())

    def save_network(self, phase: str, name: str, network: nn.Module, info: NetworkInfo) -> None:
        """Write the trained network's weights to its place in the folder."""
        files = {"alone": "student_alone.safetensors", "classroom": "student.safetensors"}
        save_network(self.path / files.get(phase, f"mentors/{name}.safetensors"), network, info)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        text = json.dumps(_finite(summary), allow_nan=False, indent=2)
        atomic_write(self.path / "summary.json", text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
