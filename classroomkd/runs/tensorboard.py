"""A run's records as TensorBoard events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from classroomkd.errors import UserError

_NOT_SCALARS = ("phase", "name", "epoch", "epochs", "mentors")


class TensorBoardWriter:
    """Writes the numbers of epoch records as scalars below ``folder``, at the step of the epoch.

    Each network is a separate TensorBoard run, ``phase/name``, so that networks share charts: tags
    are ``test_top1`` and, for each mentor, ``mentors/resnet20/active_share``. Records that a later
    process writes from some epoch on replace those of the earlier process.

    Raises UserError if the package tensorboard is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "TensorBoard events need a package that is not installed: pip install tensorboard"
            ) from None
        self._open = SummaryWriter
        self._folder = Path(folder)
        self._writers: dict[Path, Any] = {}

    def record(self, line: Mapping[str, Any]) -> None:
        """Write one epoch of one network, flushed at once; a number that is None is left out."""
        folder, epoch = self._folder / line["phase"] / line["name"], line["epoch"]
        if folder not in self._writers:
            # Readers drop what earlier files of the folder hold from this epoch on. With one folder
            # for all networks, whose epochs all begin at 1, they would drop other networks too.
            self._writers[folder] = self._open(str(folder), purge_step=epoch)
        writer = self._writers[folder]
        for tag, value in _scalars(line):
            writer.add_scalar(tag, value, epoch)
        writer.flush()

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    groups = {"": {key: value for key, value in line.items() if key not in _NOT_SCALARS}}
    groups |= {f"mentors/{name}/": values for name, values in line.get("mentors", {}).items()}
    for prefix, values in groups.items():
        for key, value in values.items():
            if value is not None and not isinstance(value, list):  # not shares by class
                yield prefix + key, value
