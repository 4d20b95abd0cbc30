"""Read and resume run folders of earlier versions.

The phase of the student that mentors teach was called "classroom", whatever the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PHASES = {"classroom": "student"}


def current_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch's record, or a result of a summary, with the current name of its phase."""
    return {**record, "phase": _PHASES.get(record["phase"], record["phase"])}


def rename_folders(run: Path) -> None:
    """Rename the folders of checkpoints and TensorBoard events that are named after a phase."""
    for old, new in _PHASES.items():
        for path in (*run.glob(f"checkpoints/{old}-*"), *run.glob(f"tensorboard/{old}")):
            path.rename(path.with_name(path.name.replace(old, new, 1)))
