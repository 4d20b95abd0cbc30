"""Trained mentors, keyed by everything that determines their training, so none is trained twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout
from torch import nn

from classroomkd.data import cache_folder
from classroomkd.errors import UserError
from classroomkd.files import atomic_write, lock, sha256
from classroomkd.models import NetworkInfo, load_network, save_network
from classroomkd.runs.interrupts import Interrupted, Interrupts
from classroomkd.runs.machine import versions

_PAUSE = 0.5  # seconds between two attempts to lock what another process has claimed


class MentorStore:
    """Networks in a folder, each under the digest of its ``deciding`` values.

    These are plain values: the digest of its training images (which thus exclude the student's
    validation and test images), their augmentation, the architecture, the training and the seed. An
    entry consists of the weights and, in a second file, the values, the SHA-256 of the weights, the
    records of the epochs and the results.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "mentors"

    def find(
        self, deciding: Mapping[str, Any], warn: Callable[[str], None]
    ) -> tuple[nn.Module, NetworkInfo, dict[str, Any]] | None:
        """The network with these values, on the CPU, its info and its ``done``, or None.

        A damaged entry is reported to ``warn`` and counts as missing.
        """
        weights, beside = self._paths(deciding)
        if not beside.exists():
            return None
        try:
            kept = json.loads(beside.read_bytes())
            if sha256(weights) != kept["sha256"]:
                raise UserError("its weights are not those that were stored")
            network, info, _ = load_network(weights)
            assert info is not None  # `add` has written it
            return network, info, kept["done"]
        except (OSError, ValueError, KeyError) as error:
            warn(f"{weights} is damaged ({error}): training it again")
            return None

    @contextmanager
    def claim(
        self, deciding: Mapping[str, Any], notify: Callable[[str], None], interrupts: Interrupts
    ) -> Iterator[None]:
        """A context that excludes other processes from the same training, of any epoch.

        It waits for another process to leave such a context, and raises Interrupted if a signal
        asks to stop during that. If the folder is not writable, nothing is locked, since nothing
        can be stored there either.
        """
        weights, _ = self._paths({**deciding, "epoch": None})
        path = weights.with_suffix(".lock")
        held = None
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = _lock(path, deciding["architecture"], notify, interrupts)
        try:
            yield
        finally:
            if held:
                with suppress(OSError):
                    path.unlink()
                held.release()

    def add(
        self,
        deciding: Mapping[str, Any],
        network: nn.Module,
        info: NetworkInfo,
        done: Mapping[str, Any],
    ) -> Path:
        """Store a trained network with ``done``: plain values, its records and results."""
        weights, beside = self._paths(deciding)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_network(weights, network, info)
        kept = {
            "deciding": dict(deciding),
            "sha256": sha256(weights),
            "versions": versions(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "done": dict(done),
        }
        atomic_write(beside, json.dumps(kept, indent=1))
        return weights

    def holds_all(self, files: Iterable[Path]) -> bool:
        """Whether the store has the weights of all these files, byte for byte."""
        stored = {sha256(file) for file in self.folder.glob("*.safetensors")}
        return all(sha256(file) in stored for file in files)

    def _paths(self, deciding: Mapping[str, Any]) -> tuple[Path, Path]:
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
        weights = self.folder / f"{deciding['architecture']}-{digest[:24]}.safetensors"
        return weights, weights.with_suffix(".json")


def _lock(
    path: Path, what: str, notify: Callable[[str], None], interrupts: Interrupts
) -> BaseFileLock:
    """Lock the file at ``path``, waiting for a process that holds the lock."""
    with suppress(Timeout):
        return lock(path, 0)
    notify(f"waiting for {what}, which another process is training")
    while True:
        with suppress(Timeout):
            return lock(path, _PAUSE)
        if interrupts.received is not None:
            raise Interrupted(interrupts.received)
