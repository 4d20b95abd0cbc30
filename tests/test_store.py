"""Mentors are trained once, and only by what decides their training told apart."""

import io
import json

import pytest
from rich.console import Console
from test_training import colours, recipe

from classroomkd import cli
from classroomkd.training.classroom import Classroom

NO_STUDENT = 'student=""'
OVERRIDES = ("store=true", "mentors=[resnet8]", "training.epochs=1", "mentor_training.epochs=2")


pytestmark = pytest.mark.usefixtures("store")


def hold(out, *overrides, train_seed=0, test_seed=1):
    text = io.StringIO()
    classroom = Classroom(recipe(*OVERRIDES, *overrides), Console(file=text, width=200))
    sets = colours(28, train_seed), colours(13, test_seed)
    return classroom.run(*sets, out), text.getvalue()


def test_a_mentor_is_trained_once(tmp_path, store, trained):
    """Whatever the student, its loss and its schedule; with its curves in either report."""
    first, _ = hold(tmp_path / "first")
    assert trained == ["resnet8 (mentor)", "resnet8 alone", "resnet8 in the classroom"]
    trained.clear()
    second, text = hold(
        tmp_path / "second", "student=resnet14", "loss.temperature=2", "training.epochs=2"
    )
    assert trained == ["resnet14 alone", "resnet14 in the classroom"]
    assert f"resnet8 (mentor): taken from {store}" in text
    assert second["results"][0] == first["results"][0] | {"reused": True}
    files = [tmp_path / run / "mentors" / "resnet8.safetensors" for run in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("first", "second")
    ]
    assert lines[0][:2] == lines[1][:2]
    assert len(lines[1]) == 2 + 2 * 2
    (kept,) = [json.loads(path.read_bytes()) for path in store.glob("*.json")]
    assert kept["deciding"]["architecture"] == "resnet8"
    assert kept["done"]["result"]["top1"] == first["results"][0]["top1"]


@pytest.mark.parametrize(
    "override",
    [
        "mentor_training.epochs=3",
        "mentor_training.weight_decay=0",
        "mentor_training.batch_size=4",
        "data.flip=false",
        "data.padding=2",
        "data.cutout=3",
        "mentor_training.mixup=0.2",
        "mentor_training.cutmix=1",
        "data.validation=0.3",
        "seed=1",
        "train images",
        "test images",
    ],
)
def test_whatever_decides_its_training_tells_it_apart(tmp_path, store, trained, override):
    hold(tmp_path / "first", NO_STUDENT)
    assert trained == ["resnet8 (mentor)"]
    if override == "train images":
        hold(tmp_path / "second", NO_STUDENT, train_seed=5)
    elif override == "test images":
        hold(tmp_path / "second", NO_STUDENT, test_seed=5)
    else:
        hold(tmp_path / "second", override, NO_STUDENT)
    assert trained == ["resnet8 (mentor)"] * 2
    assert len(list(store.glob("*.safetensors"))) == 2


def test_twins_are_two_networks(tmp_path, store, trained):
    """A second one of a kind has another seed, and the first the same as without it."""
    hold(tmp_path / "first", NO_STUDENT)
    hold(tmp_path / "second", "mentors=[resnet8,resnet8]", NO_STUDENT)
    assert trained == ["resnet8 (mentor)", "resnet8-2 (mentor)"]
    one, two = ((tmp_path / "second/mentors" / name).read_bytes() for name in TWINS)
    assert one != two


TWINS = ("resnet8.safetensors", "resnet8-2.safetensors")


@pytest.mark.parametrize("which", ["*.safetensors", "*.json"])
def test_a_damaged_entry_is_named_and_trained_again(tmp_path, store, trained, which):
    hold(tmp_path / "first", NO_STUDENT)
    (path,) = store.glob(which)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    _, text = hold(tmp_path / "second", NO_STUDENT)
    assert trained == ["resnet8 (mentor)"] * 2
    assert "is damaged" in text
    assert "training it again" in text
    hold(tmp_path / "third", NO_STUDENT)
    assert len(trained) == 2


def test_a_store_that_cannot_be_written_to_stops_nothing(tmp_path, store, trained):
    store.parent.mkdir()
    store.write_text("no folder")
    summary, text = hold(tmp_path / "run")
    assert len(trained) == len(summary["results"]) == 3
    assert "resnet8 (mentor) is not kept in the store" in text


def test_from_the_command_line(tmp_path, store, capsys, trained):
    """Mentors first, then a run that finds them."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "mentors: [resnet8]\nstudent: resnet8\n"
        "data: {source: digits, image_size: 16, loader: resident}\n"
        "training: {epochs: 1, batch_size: 256}\nmentor_training: {epochs: 1, batch_size: 256}\n"
        "threads: 1\ndevice: cpu\n"
    )
    for command in ("mentors", "train"):
        run = [command, "--recipe", str(file), "--out", str(tmp_path / command)]
        assert cli.main(run) == 0, capsys.readouterr().err
        assert (tmp_path / command / "report.html").exists()
    assert trained == ["resnet8 (mentor)", "resnet8 alone", "resnet8 in the classroom"]
    assert cli.main([*run[:-1], str(tmp_path / "x"), "store=false", "mentors=[]"]) == 2
