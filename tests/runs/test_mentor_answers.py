"""Runs that share mentors' answers: the same students, and mentors that are asked once."""

import filecmp
import io
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from classroomkd import cli, distill
from classroomkd.data.sources import split_off
from classroomkd.errors import UserError
from classroomkd.models import create
from classroomkd.report.records import read_run
from classroomkd.reproduce.plan import forward_flops, make_plan
from classroomkd.runs.builder import Builder
from classroomkd.runs.recipe import load_recipe
from classroomkd.runs.training_run import TrainingRun
from classroomkd.training.logits_files import logits_folder
from classroomkd.training.mentor_bank import MentorBank
from processes import Running
from small_runs import colours, recipe, records, same

COUNT, STEPS = 28, 3  # images, and steps of an epoch
BASE = ("store=true", "alone=false", "mentor_training.epochs=1", "mentors=[resnet8,resnet14]")
CACHED = "mentor_cache.dtype=float32"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The mentors that are run, one entry for each batch."""
    found, ask = [], MentorBank.__call__

    def spy(self, images, names=None):
        found.append(list(self.names if names is None else names))
        return ask(self, images, names)

    monkeypatch.setattr(MentorBank, "__call__", spy)
    return found


def train(out, *overrides, resume=False, n_images=COUNT):
    """The student's weights, and what the run printed."""
    text = io.StringIO()
    run = TrainingRun(recipe(*BASE, *overrides), Console(file=text, width=300))
    run.run(colours(n_images), colours(13, 1), out, resume)
    return run.students["student"].state_dict(), text.getvalue()


def test_mentors_answer_once_for_all_methods_and_seeds(tmp_path, asked):
    """And for another student too, where all have one seed of their batches."""
    without, _ = train(tmp_path / "without", "data_seed=4")
    assert len(asked) == 2 * STEPS
    asked.clear()
    first, text = train(tmp_path / "first", "data_seed=4", CACHED)
    assert same(without, first)
    assert len(asked) == 2 * STEPS
    assert "kB for 2 of 2 mentors" in text
    asked.clear()
    again, text = train(tmp_path / "again", "data_seed=4", CACHED)
    assert same(without, again)
    assert "with rows of an earlier run for every mentor" in text
    train(tmp_path / "kd", "data_seed=4", CACHED, "method=kd")
    train(tmp_path / "seed", "data_seed=4", CACHED, "seed=7", "mentor_seed=0", "data.split_seed=0")
    train(tmp_path / "student", "data_seed=4", CACHED, "student=resnet14")
    assert not asked


def test_only_mentors_that_are_new_are_run(tmp_path, asked):
    train(tmp_path / "first", CACHED, "mentors=[resnet8]")
    asked.clear()
    train(tmp_path / "second", CACHED)
    assert asked == [["resnet14"]] * 2 * STEPS


def test_another_key_does_not_serve_and_says_what_differs(tmp_path, asked):
    train(tmp_path / "first", CACHED)
    for override, difference in (
        ("data_seed=9", "seed .*, not 9"),
        ("training.batch_size=4", "batch_size 8, not 4"),
        ("mentor_cache.epochs=1", r'shape "?\[2, 28, 3\]"?, not \[1, 28, 3\]'),
        ("mentor_cache.dtype=float16", 'dtype "float32", not "float16"'),
        ("training.cutmix=1", 'mixing "None", not "Mixing'),
    ):
        asked.clear()
        _, text = train(tmp_path / override, CACHED, override)
        assert asked
        lines = [line for line in text.splitlines() if "cannot be used" in line]
        assert any(re.search(f"cannot be used: {difference}", x) for x in lines), text


def test_features_are_not_cached(tmp_path, asked):
    _, text = train(tmp_path / "run", CACHED, "method=fitnet")
    assert "method fitnet compares features: its mentors are not cached" in text
    assert asked
    assert not logits_folder().exists()


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs 1.8 kB for 2 of 2 mentors, 1.0 kB free: set ment"):
        train(tmp_path / "run", CACHED)
    assert not list(logits_folder().iterdir())


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rich.console import Console
    from small_runs import colours, recipe
    from classroomkd.runs import training_run
    from classroomkd.training.logits_files import KeptLogits

    training_run.write_report = lambda out: None
    out, number = Path(sys.argv[1]), int(sys.argv[2])
    hashed, calls = KeptLogits._hash, 0

    def write(self, epoch, samples, logits, keep=KeptLogits.write):
        global calls
        calls += 1
        if calls == number:  # between the logits and their tags
            KeptLogits._hash = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        keep(self, epoch, samples, logits)

    KeptLogits.write = write
    made = recipe(*sys.argv[3:])
    resume = (out / "inputs.json").exists()
    with open(os.devnull, "w") as nothing:
        run = training_run.TrainingRun(made, Console(file=nothing))
        run.run(colours(28), colours(13, 1), out, resume)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_student(tmp_path):
    """Killed while it keeps logits, twice, with states saved within epochs."""
    overrides = [*BASE, "checkpoint_minutes=0.00001"]
    train(tmp_path / "whole", *overrides)
    out = tmp_path / "killed"

    def run(number):
        return Running(KILLED, out, number, *overrides, CACHED).wait().returncode

    assert run(3) == -signal.SIGKILL
    assert run(5) == -signal.SIGKILL
    assert run(0) == 0
    for file in ("student.safetensors", "mentors/resnet14.safetensors"):
        assert filecmp.cmp(out / file, tmp_path / "whole" / file, shallow=False), file


# ---------------------------------------------------------------- logits of one's own


def own(folder, name="own.npy", epochs=1, count=COUNT, classes=3):
    """A file of logits that are right for two of three images."""
    values = np.random.default_rng(0).standard_normal((epochs, count, classes))
    values[:, np.arange(count), np.arange(count) % 3] += 2
    np.save(folder / name, values.astype(np.float32))
    return folder / name


@pytest.mark.usefixtures("pages")
def test_logits_of_ones_own_teach(tmp_path, asked):
    """In the recipe's order, beside a network, and in the report."""
    file = own(tmp_path)
    _, text = train(tmp_path / "run", f"mentors=[{file},resnet8]")
    assert asked == [["resnet8"]] * 2 * STEPS
    last = records(tmp_path / "run")[-1]
    assert list(last["mentors"]) == ["own.npy", "resnet8"]
    assert 0 < last["mentors"]["own.npy"]["active_share"] <= 1
    assert "taught" in last["mentors"]["resnet8"]
    assert "own.npy" in read_run(tmp_path / "run").mentors
    assert "own.npy" in (tmp_path / "run" / "report.html").read_text()
    asked.clear()
    _, text = train(tmp_path / "alone", f"mentors=[{file},resnet8]", "method=kd")
    assert "method kd uses the mentor own.npy only" in text
    assert not asked


def test_rows_follow_the_images_past_validation(tmp_path, monkeypatch):
    """A file of all training images, and one of those that are left, say the same."""
    file = own(tmp_path)
    rest, _ = split_off(colours(COUNT), 0.25, 0)
    everything = np.load(file)
    places = [
        next(i for i, image in enumerate(colours(COUNT).images) if (image == kept).all())
        for kept in rest.images
    ]
    np.save(tmp_path / "rest.npy", everything[:, places])
    students = [
        train(tmp_path / name, f"mentors=[{tmp_path / name}.npy]", "data.validation=0.25")[0]
        for name in ("own", "rest")
    ]
    assert same(*students)


@pytest.mark.parametrize(
    ("shape", "overrides", "message"),
    [
        ({"count": 27}, (), "logits of 27 images: give those of the 28 training images, in their"),
        ({"classes": 4}, (), "has 4 classes, the data has 3"),
        ({"epochs": 3}, (), "logits of 3 epochs: give those of 1, or of the 2 whose augmentation"),
        ({}, ("training.mixup=0.2",), "one answer an image, and mixup or cutmix mixes images"),
        ({}, ("method=fitnet",), r"compares features, which \S*own.npy does not have"),
        ({"count": 27}, ("data.validation=0.25",), "training images or the 22 left without valida"),
    ],
)
def test_logits_that_do_not_fit(tmp_path, shape, overrides, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", f"mentors=[{own(tmp_path, **shape)}]", *overrides)


def test_a_run_does_not_go_on_with_other_logits(tmp_path, monkeypatch, states_kept):
    file = own(tmp_path)
    train(tmp_path / "run", f"mentors=[{file}]")
    (tmp_path / "run" / "summary.json").unlink()
    np.save(file, np.load(file) + 1)
    with pytest.raises(UserError, match=r"own.npy"):
        train(tmp_path / "run", f"mentors=[{file}]", resume=True)


def test_own_logits_are_not_trained():
    with pytest.raises(UserError, match=r"mentors.0.epochs: a.npy holds logits, which have none"):
        load_recipe(values={"mentors": [{"source": "a.npy", "epochs": 3}]})


# ---------------------------------------------------------------- Python


class Doubled(nn.Module):
    """A mentor of one's own."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return 2 * self.network(images)


def test_modules_of_ones_own(tmp_path, asked):
    mentors = {"mine": Doubled(create("resnet8", 3))}
    options = {"training": {"batch_size": 8}, "threads": 1, "quiet": True, "device": "cpu"}
    options |= {"data": {"validation": 0.0}, "mentor_cache": {"dtype": "float32"}}
    students = [
        distill("resnet8", mentors, colours(COUNT), colours(9, 1), epochs=1, **options).student
        for _ in range(2)
    ]
    assert len(asked) == STEPS
    assert same(*(student.state_dict() for student in students))


def test_code_of_ones_own_is_part_of_the_key(monkeypatch):
    """Weights do not say what a module does with them."""
    network = Doubled(nn.Linear(2, 2))
    builder = Builder({"mine": network})
    before = builder.source_digest("mine", network)
    assert before == builder.source_digest("mine", Doubled(nn.Linear(2, 2)))
    monkeypatch.setattr("inspect.getsource", lambda kind: "return 3 * self.network(images)")
    assert builder.source_digest("mine", network) != before
    assert builder.source_digest("resnet8", create("resnet8", 3)) is None


def test_batches_of_a_dataloader_cannot_be_cached():
    images, targets = (np.asarray(part) for part in (colours(16).images, colours(16).targets))
    data = TensorDataset(
        torch.from_numpy(images).permute(0, 3, 1, 2).float(), torch.tensor(targets)
    )
    loader = DataLoader(data, batch_size=8)
    with pytest.raises(UserError, match="which a DataLoader's batches lack"):
        distill(
            create("resnet8", 3),
            {"a": create("resnet8", 3)},
            loader,
            loader,
            epochs=1,
            quiet=True,
            device="cpu",
            mentor_cache={"dtype": "float16"},
        )


# ---------------------------------------------------------------- tables


def test_a_plan_says_what_the_cache_saves():
    """Each mentor answers once for a seed, or once in all where seeds share their batches."""
    chosen = {"method_names": ["alone", "classroom", "kd", "fitnet"], "seeds": (0, 1)}
    plain = make_plan("methods", **chosen)
    one_seed = make_plan("methods", **chosen, overrides=["mentor_cache.dtype=float16"])
    shared = make_plan("methods", **chosen, mentor_cache="float16")
    teacher, *peers = (forward_flops(m.source, 32) for m in plain.runs[1].recipe.mentors)
    everyone, epochs = teacher + sum(peers), 240
    names = [run.id.rpartition("/")[0].rpartition("/")[2] for run in shared.runs]
    assert names == ["alone", "classroom", "kd", "fitnet"] * 2
    by_seed = [0, 0, teacher, 0] * 2
    in_all = [0, 0, teacher, 0, 0, everyone, teacher, 0]
    assert [run.saved for run in plain.runs] == [0] * 8
    assert [run.saved / epochs for run in one_seed.runs] == pytest.approx(by_seed)
    assert [run.saved / epochs for run in shared.runs] == pytest.approx(in_all)
    assert [run.work + run.saved for run in shared.runs] == pytest.approx(
        [run.work for run in plain.runs]
    )
    assert {run.recipe.data_seed for run in shared.runs} == {0}
    assert {run.recipe.data_seed for run in one_seed.runs} == {None}
    assert [task.id for task in shared.mentors] == [task.id for task in plain.mentors]


def test_a_plan_says_what_the_cache_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of each mentor epochs · N · (C · itemsize + 4) bytes, once, or once for each seed."""
    counts = [n - round(0.2 * n) for n in np.bincount(load_digits().target)]  # to train on
    command = ["reproduce", "methods", "--data", "digits", "--classrooms", "small", "--plan"]
    command += ["--methods", "classroom", "kd", "--out", str(tmp_path)]
    assert cli.main([*command, "--mentor-cache", "float16"]) == 0
    assert _takes(capsys) == f"{3 * 30 * sum(counts) * (10 * 2 + 4) / 1e6:.1f} MB"
    # Three seeds' own, of the images that are not for validation, in one augmentation.
    each = ["mentor_cache.epochs=1", "data.validation=0.1", "training.epochs=2"]
    assert cli.main([*command, *each]) == 0
    rest = sum(n - round(0.1 * n) for n in counts)
    assert _takes(capsys) == f"{3 * 3 * rest * (10 * 4 + 4) / 1e6:.1f} MB"
    assert cli.main(["reproduce", "methods", "--mentor-cache", "float16", "--plan"]) == 0
    assert _takes(capsys) == ""  # nobody knows of which images


def _takes(capsys: pytest.CaptureFixture[str]) -> str:
    """What the mentor cache takes by the plan that was printed."""
    found = re.search(
        r"of the runs' operations(?: and takes (.*))?$", capsys.readouterr().out, re.M
    )
    assert found
    return found[1] or ""


def test_a_plan_counts_the_epochs_whose_augmentation_repeats():
    cached = make_plan(
        "methods", method_names=["classroom"], seeds=(0,), overrides=["mentor_cache.epochs=24"]
    )
    plain = make_plan("methods", method_names=["classroom"], seeds=(0,))
    mentors = sum(forward_flops(m.source, 32) for m in plain.runs[0].recipe.mentors)
    assert cached.runs[0].saved == pytest.approx(216 * mentors)
    assert json.dumps(cached.runs[0].arguments).count("mentor_cache.epochs=24") == 1
