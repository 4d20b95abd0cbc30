"""The folder that a training run writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, Timeout
from torch import nn

from classroomkd.errors import UserError
from classroomkd.files import atomic_write, lock, remove_leftovers
from classroomkd.models import NetworkInfo, save_network
from classroomkd.runs.checkpoints import Checkpoints
from classroomkd.runs.old_runs import current_record, rename_folders
from classroomkd.runs.tensorboard import TensorBoardWriter

_PATIENCE = 10.0  # seconds for the children of a killed process to end


class RunFolder:
    """Writes the records of one run as they come, and its networks, each file atomically.

    With ``resume`` the folder is that of an earlier process. Of several processes only one
    ``writes``; in the others the writing methods do nothing. Raises UserError if the folder cannot
    be written to, or TensorBoard is requested but not installed.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        resume: bool = False,
        writes: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.path, self.writes = path, writes
        self._lines: list[Mapping[str, Any]] = []
        self._claim: BaseFileLock | None = None
        self._board = TensorBoardWriter(path / "tensorboard") if tensorboard and writes else None
        if not writes:
            return
        if resume:
            self._claim = _claimed(path)
            rename_folders(path)
            for folder in (path, *filter(Path.is_dir, path.rglob("*"))):
                remove_leftovers(folder)
            for done in (path / "checkpoints").glob("*/done.json"):
                Checkpoints(done.parent).clear()
            return
        try:
            for folder in (path, path / "checkpoints", path / "mentors"):
                folder.mkdir(parents=True, exist_ok=True)
            (path / "metrics.jsonl").touch(exist_ok=False)  # another run may have started here
            atomic_write(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        except OSError as error:
            raise UserError(
                f"cannot write to {path}: {error.strerror}: choose another --out"
            ) from None
        self._claim = _claimed(path)

    def require_same(self, inputs: Mapping[str, str]) -> None:
        """Record the digests of the run's inputs, or raise UserError if they have changed."""
        path = self.path / "inputs.json"
        if not self.writes:
            return
        if not path.exists():
            atomic_write(path, json.dumps(dict(inputs), indent=2) + "\n")
            return
        for name, digest in _read(path).items():
            if inputs.get(name) != digest:
                raise UserError(f"{name} changed since {self.path} was started: start a new run")

    def begin(self, start: Mapping[str, Any]) -> None:
        """Record the start of a process that works on the run, as `machine.start` describes it."""
        if self.writes:
            _append(self.path / "starts.jsonl", start)

    def record(self, line: Mapping[str, Any]) -> None:
        """Append ``line`` to metrics.jsonl at once; a number that is not finite becomes null."""
        if not self.writes:
            return
        self._lines.append(line)
        _append(self.path / "metrics.jsonl", line)
        if self._board:
            self._board.record(line)

    def adopt_records(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep these lines of an earlier process in metrics.jsonl, and drop all later ones."""
        if not self.writes:
            return
        lines = [current_record(line) for line in lines]
        self._lines += lines
        atomic_write(self.path / "metrics.jsonl", "".join(map(_line, self._lines)))
        if self._board:
            for line in lines:
                self._board.record(line)

    def checkpoints(self, phase: str, name: str, keep: int = 2) -> Checkpoints:
        """The training states of one network, of which the last ``keep`` are kept."""
        return Checkpoints(self.path / "checkpoints" / f"{phase}-{name}", keep)

    def network_path(self, phase: str, name: str) -> Path:
        """The file of a trained network's weights."""
        files = {"alone": "student_alone.safetensors", "student": "student.safetensors"}
        return self.path / files.get(phase, f"mentors/{name}.safetensors")

    def keep_best(self, phase: str, name: str, weights: Path) -> None:
        """Keep the file of a network's best epoch beside that of its last epoch."""
        path = self.network_path(phase, name)
        if self.writes and weights.exists():  # unless damaged states forced it to resume earlier
            atomic_write(path.with_stem(f"{path.stem}_best"), weights.read_bytes())

    def finish_network(
        self, phase: str, name: str, network: nn.Module, info: NetworkInfo, done: Mapping[str, Any]
    ) -> None:
        """Write a trained network's weights, then ``done``, which `finished` returns from now on.

        Its training states are deleted, because there is nothing left to resume.
        """
        if not self.writes:
            return
        save_network(self.network_path(phase, name), network, info)
        checkpoints = self.checkpoints(phase, name)
        checkpoints.folder.mkdir(exist_ok=True)
        atomic_write(checkpoints.folder / "done.json", json.dumps(done))
        checkpoints.clear()

    def finished(self, phase: str, name: str) -> dict[str, Any] | None:
        """The ``done`` passed to `finish_network`, or None if the network is not trained yet."""
        path = self.checkpoints(phase, name).folder / "done.json"
        if not path.exists():
            return None
        done = _read(path)
        return done | {"result": current_record(done["result"])}

    def close(self) -> None:
        """Release the folder, so that another process may resume the run."""
        if self._claim:
            self._claim.release()
            self._claim = None

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        if not self.writes:
            return
        if self._board:
            self._board.close()
        text = json.dumps(_finite(summary), allow_nan=False, indent=2)
        atomic_write(self.path / "summary.json", text + "\n")


@contextmanager
def errors_name_run(out: Path, resuming: str) -> Iterator[None]:
    """Name the run's folder, and the command that resumes it, in interruptions and I/O errors."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if (out / "inputs.json").exists():
            interrupt.args = (f"{resuming} continues from the last checkpoint in {out}",)
        raise
    except OSError as error:  # a write to a full disk does not say where
        error.filename = error.filename or str(out)
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): start a new run") from None


def _claimed(run: Path) -> BaseFileLock:
    """Lock the run for this process; raises UserError if another process has it."""
    try:
        return lock(run / "config.yaml", _PATIENCE)
    except Timeout:
        raise UserError(f"another process is using {run}: wait for it, or stop it") from None


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(record))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
