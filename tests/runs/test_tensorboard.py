"""TensorBoard events, read back by tensorboard itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from classroomkd.errors import UserError
from classroomkd.runs.tensorboard import TensorBoardWriter

pytest.importorskip("tensorboard")


def line(phase: str, name: str, epoch: int, value: float | None, **more: object) -> dict:
    record = {"phase": phase, "name": name, "epoch": epoch, "epochs": 5}
    return record | {"train_loss": 2.0 / epoch, "test_top1": value} | more


def taught(share: float) -> dict:
    return {"mentors": {"resnet20": {"active_share": share, "kl": None, "taught": [share, None]}}}


LINES = [
    *(line("mentor", "resnet20", epoch, 0.1 * epoch) for epoch in (1, 2, 3, 4, 5)),
    *(
        line("student", "resnet8", epoch, 0.125 * epoch, **taught(0.5 / epoch))
        for epoch in (1, 2, 3, 4)
    ),
]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard shows of the folder: {run/tag: its steps and values}."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    shown = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    return {
        f"{run}/{tag}": [(event.step, event.value) for event in shown.Scalars(run, tag)]
        for run, tags in shown.Runs().items()
        for tag in tags["scalars"]
    }


def expected() -> dict:
    values: dict = {}
    for record in LINES:
        place, epoch = f"{record['phase']}/{record['name']}", record["epoch"]
        values.setdefault(f"{place}/train_loss", []).append((epoch, record["train_loss"]))
        values.setdefault(f"{place}/test_top1", []).append((epoch, record["test_top1"]))
        if "mentors" in record:
            share = record["mentors"]["resnet20"]["active_share"]
            tag = f"{place}/mentors/resnet20/active_share"
            values.setdefault(tag, []).append((epoch, share))
    return values


def write(folder: Path, lines: list[dict]) -> None:
    writer = TensorBoardWriter(folder)
    for record in lines:
        writer.record(record)
    writer.close()


def assert_shown(folder: Path, values: dict) -> None:
    shown = scalars(folder)
    assert shown.keys() == values.keys()
    for tag, points in values.items():
        assert [step for step, _ in shown[tag]] == [epoch for epoch, _ in points], tag
        assert [v for _, v in shown[tag]] == pytest.approx([v for _, v in points], rel=1e-6), tag


def test_events_are_the_records(tmp_path):
    write(tmp_path, LINES)
    assert_shown(tmp_path, expected())


@pytest.mark.parametrize("again_from", [0, 5, 7])
def test_a_resumed_run_counts_every_epoch_once(tmp_path, again_from):
    """Whether the later process records all anew, one network, or what the checkpoint lacked."""
    stale = [record | {"train_loss": 99.0} for record in LINES]
    write(tmp_path, LINES[:again_from] + stale[again_from:])
    write(tmp_path, LINES[again_from:])
    assert_shown(tmp_path, expected())


def test_an_epoch_is_in_the_file_before_the_next(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.record(LINES[0])
    assert scalars(tmp_path)["mentor/resnet20/test_top1"] == [(1, pytest.approx(0.1))]
    writer.close()


def test_a_gap_stays_a_gap(tmp_path):
    write(tmp_path, [LINES[0], line("mentor", "resnet20", 2, None)])
    assert len(scalars(tmp_path)["mentor/resnet20/test_top1"]) == 1
    assert len(scalars(tmp_path)["mentor/resnet20/train_loss"]) == 2


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install tensorboard") as error:
        TensorBoardWriter(tmp_path)
    assert "\n" not in str(error.value)
