"""The progress display while networks train."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_QUIET = 60.0  # seconds between lines about epochs if there is no terminal for a bar


def print_line(console: Console, line: str) -> None:
    """Print a line as it is, however long: names may look like rich's markup or emoji codes."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


class TrainingProgress:
    """A bar over the steps of all networks, a table of mentors, and a line per finished network."""

    def __init__(self, console: Console) -> None:
        self._progress = _Display(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[latest]}"),
            console=console,
            expand=True,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, latest="")
        self._called, self._told = "", time.monotonic()

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin_run(self, steps: int) -> None:
        """Set the number of steps that all networks take together."""
        self._progress.update(self._task, total=steps)

    def begin(self, called: str, epoch: int, epochs: int) -> None:
        """Show the network and the epoch that it starts, counted from 1."""
        self._called = called
        self._progress.update(self._task, description=f"{called} {epoch}/{epochs}")
        if epoch == 1:
            self._progress.update(self._task, latest="")
            self._progress.mentor_table = None

    def advance(self, steps: int = 1) -> None:
        """Count steps, taken now or by an earlier process."""
        self._progress.advance(self._task, steps)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show the numbers of a finished epoch."""
        self._progress.update(self._task, latest=_numbers(record))
        self._progress.mentor_table = _mentor_table(record) if record.get("mentors") else None
        if not self._progress.console.is_terminal and time.monotonic() - self._told >= _QUIET:
            self._tell(f"epoch {record['epoch']}/{record['epochs']}: {_numbers(record)}")

    def done(self, called: str, record: Mapping[str, Any]) -> None:
        """Print a line about a network's last epoch."""
        self._called = called
        self._tell(f"epoch {record['epoch']}: {_numbers(record)} held out")

    def _tell(self, line: str) -> None:
        self._told = time.monotonic()
        print_line(self._progress.console, f"{self._called}, {line}")


class _Display(Progress):
    """A progress bar, with a table of the mentors below it if there are mentor statistics."""

    mentor_table: Table | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.mentor_table is not None:
            yield self.mentor_table


def _mentor_table(record: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("in the last epoch", "taught", "rank weight", "temperature", "KL"):
        table.add_column(column, justify="left" if column.startswith("in") else "right")
    for name, means in record["mentors"].items():
        shares = f"{means['active_share']:.1%}", f"{means['rank_weight']:.2f}"
        table.add_row(Text(name), *shares, f"{means['temperature']:.2f}", f"{means['kl']:.3f}")
    confidence, task = record["student_confidence"], record["task_loss"]
    table.add_row(f"the student: confidence {confidence:.1%}, task loss {task:.3f}")
    return table


def _numbers(record: Mapping[str, Any]) -> str:
    return (
        f"{record['images_per_second']:,.0f} img/s, loss {record['train_loss']:.3f}, "
        f"top-1 {record['test_top1']:.1%}"
    )
