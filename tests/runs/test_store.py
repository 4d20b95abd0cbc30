"""Mentors are trained once, and only by what decides their training told apart."""

import json
import shutil

import pytest

from classroomkd import cli
from small_runs import stored_run

NO_STUDENT = 'student=""'


pytestmark = pytest.mark.usefixtures("store")


def test_a_mentor_is_trained_once(tmp_path, store, trained):
    """Whatever the student, its loss and its schedule; with its curves in either report."""
    first, _ = stored_run(tmp_path / "first")
    assert trained == ["resnet8 (mentor)", "resnet8 alone", "resnet8 in the classroom"]
    trained.clear()
    second, text = stored_run(
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


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache whose store holds a mentor, and soon those that are told apart from it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASSROOMKD_CACHE", str(folder))
        stored_run(folder / "first", NO_STUDENT)
    shutil.rmtree(folder / "first")
    return folder


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
def test_whatever_decides_its_training_tells_it_apart(
    tmp_path, kept, trained, monkeypatch, override
):
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(kept))
    before = len(list(kept.rglob("*.safetensors")))
    assert before
    if override == "train images":
        stored_run(tmp_path / "second", NO_STUDENT, train_seed=5)
    elif override == "test images":
        stored_run(tmp_path / "second", NO_STUDENT, test_seed=5)
    else:
        stored_run(tmp_path / "second", override, NO_STUDENT)
    assert trained == ["resnet8 (mentor)"]
    assert len(list(kept.rglob("*.safetensors"))) == before + 1


def test_twins_are_two_networks(tmp_path, store, trained):
    """A second one of a kind has another seed, and the first the same as without it."""
    stored_run(tmp_path / "first", NO_STUDENT)
    stored_run(tmp_path / "second", "mentors=[resnet8,resnet8]", NO_STUDENT)
    assert trained == ["resnet8 (mentor)", "resnet8-2 (mentor)"]
    one, two = ((tmp_path / "second/mentors" / name).read_bytes() for name in TWINS)
    assert one != two


TWINS = ("resnet8.safetensors", "resnet8-2.safetensors")


@pytest.mark.parametrize("which", ["*.safetensors", "*.json"])
def test_a_damaged_entry_is_named_and_trained_again(tmp_path, store, trained, which):
    stored_run(tmp_path / "first", NO_STUDENT)
    (path,) = store.glob(which)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    _, text = stored_run(tmp_path / "second", NO_STUDENT)
    assert trained == ["resnet8 (mentor)"] * 2
    assert "is damaged" in text
    assert "training it again" in text
    stored_run(tmp_path / "third", NO_STUDENT)
    assert len(trained) == 2


def test_a_store_that_cannot_be_written_to_stops_nothing(tmp_path, store, trained):
    store.parent.mkdir()
    store.write_text("no folder")
    summary, text = stored_run(tmp_path / "run")
    assert len(trained) == len(summary["results"]) == 3
    assert "resnet8 (mentor) is not stored" in text


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
