"""Training states on disk: written atomically, the last few kept, damaged ones skipped."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from classroomkd.errors import UserError
from classroomkd.files import atomic_write
from classroomkd.models import NetworkInfo, save_network
from classroomkd.models.layout import bare
from classroomkd.runs.interrupts import Interrupted, Interrupts
from classroomkd.runs.jobs import best
from classroomkd.training.trainer import READ_EVERY, Trainer

_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")


class Checkpoints:
    """The training states of one network, in a separate folder.

    File names contain the step and the first digits of the SHA-256, so that damage is detected
    before the file is loaded.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Write ``state`` as of ``step`` atomically, then remove all but the last ``keep``."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:09}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        atomic_write(path, content)
        for old in self._files()[self.keep :]:
            old.unlink(missing_ok=True)

    def keep_best(self, network: nn.Module, info: NetworkInfo, epoch: int) -> None:
        """Write the weights of an epoch that is the best so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_network(self.best(epoch), bare(network), info)

    def forget_bests_but(self, epochs: Collection[int]) -> None:
        """Remove the weights of other epochs."""
        kept = set(map(self.best, epochs))
        for path in self.folder.glob(self.best("*").name):
            if path not in kept:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all checkpoints, after the training has finished."""
        self.forget_bests_but([])
        for path in self._files():
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "code", ignore_errors=True)  # kept beside the best weights

    def best(self, epoch: int | str) -> Path:
        """The file with the weights of an epoch while it is the best."""
        return self.folder / f"best-{epoch}.safetensors"

    def newest(self) -> Path | None:
        """The checkpoint of the last step, if any."""
        return next(iter(self._files()), None)

    def load(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The state of the last step whose file is intact; damaged files are passed to ``warn``."""
        files = self._files()
        for path, earlier in zip_longest(files, files[1:]):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == _parsed(path)[2]:
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            warn(f"{path} is damaged: " + ("using the previous one" if earlier else "beginning"))
        return None

    def _files(self) -> list[Path]:
        """The checkpoints, newest first."""
        found = [path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_parsed(path)[1]), reverse=True)


def _parsed(path: Path) -> re.Match[str]:
    """The name of a checkpoint: its step, and the digest of its content."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match


class Saver:
    """Saves a trainer's state, with the ``records`` of its epochs, when a save is due.

    A save is due after every ``epochs`` epochs, ``minutes`` after the last save, and after a signal
    to stop. With ``keeps_best`` the weights of the best epoch on the validation images are kept
    too.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        trainer: Trainer,
        info: NetworkInfo,
        interrupts: Interrupts,
        *,
        epochs: int,
        minutes: float,
        keeps_best: bool = False,
    ) -> None:
        self.checkpoints, self.trainer, self.info = checkpoints, trainer, info
        self.interrupts, self.epochs, self.seconds = interrupts, epochs, 60 * minutes
        self.keeps_best = keeps_best
        self._bests: deque[int | None] = deque(maxlen=checkpoints.keep)
        self.records: list[dict[str, Any]] = []
        self._saved = time.monotonic()

    def best_epoch(self) -> int | None:
        """The epoch with the highest top-1 on the validation images, if there are any."""
        return best(self.records).get("chosen_epoch") if self.records else None

    def restore(self, warn: Callable[[str], None]) -> bool:
        """Restore the last state; False if there is none. Damaged files are passed to ``warn``.

        Raises UserError if the state was written by an incompatible version.
        """
        state = self.checkpoints.load(warn)
        if state is None:
            return False
        if missing := {*self.trainer.state_dict(), "records"} - state.keys():
            raise UserError(
                f"the training states in {self.checkpoints.folder} are of another version and lack "
                f"{', '.join(sorted(missing))}: start a new run"
            )
        self.trainer.load_state_dict(state)
        self.records = state["records"]
        return True

    def between_steps(self) -> None:
        """Save if a save is due; if asked to stop, save and raise Interrupted."""
        stop = self.interrupts.received is not None
        due = time.monotonic() - self._saved >= self.seconds
        # Other loaders resume from the end of an epoch, whose state is saved already.
        resumable = self.trainer.loader.seekable or not self.trainer.batch
        processes = self.trainer.processes
        if resumable and processes.together:  # they must agree; every few steps is enough
            if self.trainer.batch % READ_EVERY:
                return
            stop, due = processes.any(stop), processes.any(due)
        if resumable and (stop or due):
            self.save()
        if stop:
            raise Interrupted(self.interrupts.received or signal.SIGTERM)

    def after_epoch(self) -> None:
        """The same at the end of an epoch, after its record was added to ``records``."""
        epoch, main = self.trainer.epoch - 1, self.trainer.processes.is_main
        if self.keeps_best and main and self.best_epoch() == epoch:
            self.checkpoints.keep_best(self.trainer.network, self.info, epoch)
        if (self.trainer.epoch - 1) % self.epochs == 0:
            self.save()
        self.between_steps()

    def save(self) -> None:
        """Save now; raises UserError instead if a loss of this epoch was not finite."""
        trainer = self.trainer
        trainer.require_finite()
        state = trainer.state_dict() | {"records": self.records, "info": asdict(self.info)}
        if trainer.processes.is_main:
            step = (trainer.epoch - 1) * len(trainer.loader) + trainer.batch
            self.checkpoints.save(state, step)
            self._bests.append(self.best_epoch())
            if self.keeps_best and len(self._bests) == self.checkpoints.keep:
                # No older state is kept for which another epoch was the best.
                self.checkpoints.forget_bests_but([epoch for epoch in self._bests if epoch])
        self._saved = time.monotonic()

    def last_good(self) -> str:
        """The end of an error message: the last state that can be resumed from."""
        newest = self.checkpoints.newest()
        return f" (the last good state is in {newest})" if newest else ""
