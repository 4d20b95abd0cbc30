"""What a person sees while networks train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """One bar over the steps of all networks, and a line for each network that is done."""

    def __init__(self, console: Console, steps: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[latest]}"),
            console=console,
            expand=True,
            transient=True,
        )
        self._task = self._progress.add_task("", total=steps, latest="")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, called: str, epoch: int, epochs: int) -> None:
        """Name the network and the epoch that it begins, counted from 1."""
        self._progress.update(self._task, description=escape(f"{called} {epoch}/{epochs}"))
        if epoch == 1:
            self._progress.update(self._task, latest="")

    def step(self) -> None:
        """Count one step."""
        self._progress.advance(self._task)

    def skip(self, steps: int) -> None:
        """Count steps that an earlier process has taken."""
        self._progress.advance(self._task, steps)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show the numbers of a finished epoch."""
        self._progress.update(self._task, latest=_numbers(record))

    def done(self, called: str, record: Mapping[str, Any]) -> None:
        """Leave a line about a network's last epoch."""
        line = f"{called}, epoch {record['epoch']}: {_numbers(record)} held out"
        self._progress.console.print(escape(line), highlight=False, soft_wrap=True)


def _numbers(record: Mapping[str, Any]) -> str:
    return (
        f"{record['images_per_second']:,.0f} img/s, loss {record['train_loss']:.3f}, "
        f"top-1 {record['test_top1']:.1%}"
    )
