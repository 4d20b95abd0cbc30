"""Runs by other methods, with mentors of earlier epochs, with a best epoch kept."""

import copy
import errno
import io
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console

import processes
from classroomkd import cli
from classroomkd.errors import UserError
from classroomkd.models import load_network
from classroomkd.runs import networks as networks_module
from classroomkd.runs.interrupts import Interrupted, Interrupts
from classroomkd.runs.progress import TrainingProgress
from classroomkd.runs.run_folder import RunFolder
from classroomkd.runs.store import MentorStore
from classroomkd.runs.training_run import TrainingRun
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.trainer import Trainer
from patience import LAST_RESORT
from small_runs import colours, recipe, records, same, stored_run, values_of

pytestmark = pytest.mark.usefixtures("store")

TEACHER, CLASSROOM = "resnet8 (mentor)", "resnet8 in the classroom"


def weights(out: Path, file: str) -> bytes:
    return (out / file).read_bytes()


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("method", "mentors", "taught"),
    [
        ("alone", [], ["resnet8 alone"]),
        ("kd", ["resnet8"], ["resnet8 alone", "resnet8 by kd"]),
        ("aver", ["resnet8", "resnet14"], ["resnet8 alone", "resnet8 by aver"]),
        ("fitnet", ["resnet8"], ["resnet8 alone", "resnet8 by fitnet"]),
    ],
)
def test_only_the_mentors_that_a_method_asks_for_are_trained(
    tmp_path, trained, method, mentors, taught
):
    summary, text = stored_run(
        tmp_path / "run", "mentors=[resnet8,resnet14]", f"method={method}", "training.epochs=2"
    )
    told = f"method {method} uses the mentor resnet8 only; the others are not loaded"
    assert (told in text) == (len(mentors) == 1)
    assert trained == [f"{name} (mentor)" for name in mentors] + taught
    assert summary["method"] == method
    assert [result["name"] for result in summary["results"]] == mentors + ["resnet8"] * len(taught)
    assert (tmp_path / "run" / "report.html").exists()
    if method != "alone":
        alone, other = (
            load_network(tmp_path / "run" / file)[0].state_dict()
            for file in ("student_alone.safetensors", "student.safetensors")
        )
        assert not same(alone, other)
        assert "mentors" not in records(tmp_path / "run")[-1]


def test_without_the_student_alone(tmp_path, trained):
    both, _ = stored_run(tmp_path / "both")
    only, _ = stored_run(tmp_path / "only", "alone=false")
    assert trained[3:] == [CLASSROOM]
    assert only["results"][-1] == both["results"][-1]
    assert len(only["results"]) == 2


def test_a_hint_learns_too_and_is_in_the_state(tmp_path, monkeypatch, states_kept):
    """Its regressor's weights are trained, saved and taken up again."""
    trainers = []

    class Spy(Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            trainers.append((self, values_of(self.method)))

    monkeypatch.setattr(networks_module, "Trainer", Spy)
    overrides = "method=fitnet", "training.epochs=2", "alone=false"
    stored_run(tmp_path / "whole", *overrides)
    (_, before), *_ = [pair for pair in trainers if pair[1]]
    trainer = trainers[-1][0]
    after = values_of(trainer.method)
    assert before
    assert not any(torch.equal(before[name], after[name]) for name in before if "weight" in name)
    folder = tmp_path / "whole" / "checkpoints" / "student-resnet8"
    states = [torch.load(path, weights_only=True) for path in sorted(folder.glob("step-*.pt"))]
    assert same(states[-1]["method"], after)
    # From the state after its first epoch it comes to the same end.
    (folder / "done.json").unlink()
    max(folder.glob("step-*.pt")).unlink()
    (tmp_path / "whole" / "summary.json").unlink()
    student = weights(tmp_path / "whole", "student.safetensors")
    (tmp_path / "whole" / "student.safetensors").unlink()
    classroom = TrainingRun(
        recipe("store=true", "mentors=[resnet8]", "mentor_training.epochs=2", *overrides),
        Console(file=io.StringIO()),
    )
    classroom.run(colours(28, 0), colours(13, 1), tmp_path / "whole", resume=True)
    assert weights(tmp_path / "whole", "student.safetensors") == student


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=fitnet", "method_options.stage=9"], "stage"),
        (
            ["method=at", "mentors=[{source: 'tv:resnet18', epochs: 1}]"],
            "name its layers, as student_layers",
        ),
    ],
)
def test_features_that_there_are_not_are_missed_before_anything_is_trained(overrides, message):
    with pytest.raises(UserError, match=message):
        TrainingRun(recipe(*overrides), Console(file=io.StringIO()))


# ---------------------------------------------------------------- mixed images


@pytest.mark.parametrize("alpha", ["mixup", "cutmix"])
def test_a_method_that_takes_no_mixed_labels_is_told_before_anything_is_read(alpha):
    with pytest.raises(UserError) as raised:
        TrainingRun(recipe("method=dkd", f"training.{alpha}=0.2"), Console(file=io.StringIO()))
    assert str(raised.value) == (
        f"method dkd needs one class per image, which training.{alpha}=0.2 rules out: set it "
        "to 0 or use another method"
    )
    # Its mentors learn alone.
    TrainingRun(recipe("method=dkd", f"mentor_training.{alpha}=0.2"), Console(file=io.StringIO()))


@pytest.mark.parametrize("method", ["classroom", "kd"])
def test_students_and_mentors_see_the_same_mixed_images(tmp_path, monkeypatch, method):
    """Those that mentors were trained on are as they were, unless the recipe mixes them too."""
    steps, heard, hits = [], [], []
    step, hear = Trainer._step, MentorBank.__call__

    def spied_step(self, images, targets):
        with torch.no_grad():
            predicted = copy.deepcopy(self.network)(images).argmax(1)
        steps.append((self.name, images, targets))
        if targets.dim() == 2:
            shares = [row[c] for row, c in zip(targets.tolist(), predicted.tolist(), strict=True)]
            hits.append((self.name, sum(shares) / len(shares)))
        step(self, images, targets)

    def spied_hear(self, images):
        heard.append(images)
        return hear(self, images)

    monkeypatch.setattr(Trainer, "_step", spied_step)
    monkeypatch.setattr(MentorBank, "__call__", spied_hear)
    mixing = "training.mixup=0.4", "training.cutmix=1.0"
    stored_run(tmp_path / "mixed", *mixing, f"method={method}")
    by = {}
    for name, images, targets in steps:
        by.setdefault(name, []).append((images, targets))
    mentor, alone, taught = by.values()
    assert all(targets.dtype == torch.int64 for _, targets in mentor)
    for (images, targets), (also, labels) in zip(alone, taught, strict=True):
        assert torch.equal(images, also)
        assert torch.equal(targets, labels)
        assert targets.shape == (8, 3)
    labels = torch.cat([targets for _, targets in alone])
    assert ((labels > 0).sum(1) == 2).any()
    assert all(torch.equal(a, b) for a, (b, _) in zip(heard, taught, strict=True))
    for record in records(tmp_path / "mixed"):
        if record["phase"] == "alone":
            shares = [share for name, share in hits if name == list(by)[1]]
            assert record["train_top1"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    # The mentors' own.
    steps.clear()
    stored_run(tmp_path / "mentor", "mentor_training.mixup=0.4", f"method={method}")
    assert {(name, targets.dim()) for name, _, targets in steps} == {
        (name, 1 + (name == TEACHER)) for name in by
    }


# ---------------------------------------------------------------- mentors of earlier epochs


def test_a_mentor_of_an_earlier_epoch_is_on_the_way_to_the_later_one(tmp_path, store, trained):
    """One training for both, from which each is kept as if it were alone."""
    both, _ = stored_run(
        tmp_path / "both", "mentors=[resnet8@1,resnet8,resnet8@2]", "mentor_training.epochs=3"
    )
    assert trained.count(TEACHER) == 1
    names = ["resnet8@1", "resnet8", "resnet8@2"]
    mentors = [result for result in both["results"] if result["phase"] == "mentor"]
    assert [(mentor["name"], mentor["epochs"]) for mentor in mentors] == [
        *zip(names, (1, 3, 2), strict=True)
    ]
    curves = {name: [r for r in records(tmp_path / "both") if r["name"] == name] for name in names}
    for mentor in mentors:
        curve = [r for r in curves[mentor["name"]] if r["phase"] == "mentor"]
        assert [record["epoch"] for record in curve] == list(range(1, mentor["epochs"] + 1))
        assert curve[-1]["test_top1"] == mentor["top1"]
        assert {record["epochs"] for record in curve} == {mentor["epochs"]}
    assert len(list(store.glob("*.safetensors"))) == 3
    trained.clear()
    for name in names:  # each is found, and is what it would be if trained by itself
        options = f"mentors=[{name}]", "mentor_training.epochs=3", 'student=""'
        stored_run(tmp_path / name, *options)
        fresh = tmp_path / f"{name}-fresh"
        classroom = TrainingRun(recipe("store=false", *options), Console(file=io.StringIO()))
        classroom.run(colours(28, 0), colours(13, 1), fresh)
        file = f"mentors/{name}.safetensors"
        assert weights(tmp_path / name, file) == weights(fresh, file)
        assert weights(tmp_path / "both", file) == weights(fresh, file)
    assert len(trained) == 3  # the fresh ones


def test_interrupted_between_the_epochs_that_are_kept(tmp_path, monkeypatch):
    options = "mentors=[resnet8@1,resnet8]", "mentor_training.epochs=3", 'student=""'

    def run(out, resume=False):
        classroom = TrainingRun(recipe(*options), Console(file=io.StringIO()))
        return classroom.run(colours(28, 0), colours(13, 1), out, resume=resume)

    whole = run(tmp_path / "whole")
    train_epoch = Trainer.train_epoch

    def interrupted(self, on_step=None):
        if self.epoch == 3:
            raise KeyboardInterrupt
        return train_epoch(self, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    parts = run(tmp_path / "parts", resume=True)
    assert parts["results"] == whole["results"]
    for name in ("resnet8@1", "resnet8"):
        file = f"mentors/{name}.safetensors"
        assert weights(tmp_path / "parts", file) == weights(tmp_path / "whole", file)
    lines = [
        sorted((r["name"], r["epoch"], r["train_loss"]) for r in records(tmp_path / name))
        for name in ("parts", "whole")
    ]
    assert lines[0] == lines[1]


def test_an_epoch_that_a_schedule_does_not_reach():
    with pytest.raises(UserError, match=r"mentors\.0\.at must be an epoch from 1 to 2, not 3"):
        recipe("mentors=[resnet8@3]")


# ---------------------------------------------------------------- seeds


def test_runs_of_several_seeds_may_share_mentors_and_images(tmp_path, trained):
    shared = "mentor_seed=7", "data.split_seed=5", "data.validation=0.2"
    first, _ = stored_run(tmp_path / "first", *shared)
    again, _ = stored_run(tmp_path / "again", *shared, "seed=1")
    assert trained.count(TEACHER) == 1
    assert again["results"][0] == first["results"][0] | {"reused": True}
    assert weights(tmp_path / "first", "inputs.json") == weights(tmp_path / "again", "inputs.json")
    assert weights(tmp_path / "first", "student.safetensors") != weights(
        tmp_path / "again", "student.safetensors"
    )


# ---------------------------------------------------------------- what another process is at


def _train_mentors(folder: Path) -> str:
    os.environ["CLASSROOMKD_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    _, text = stored_run(folder / str(os.getpid()), 'student=""', "mentor_training.epochs=20")
    return text


@pytest.mark.slow
def test_two_processes_train_a_mentor_once(tmp_path, store):
    with ProcessPoolExecutor(2, processes.context()) as pool:
        both = [pool.submit(_train_mentors, tmp_path) for _ in range(2)]
        texts = [training.result(LAST_RESORT) for training in both]  # or its error, at once
    assert sum("taken from" in text for text in texts) == 1
    assert len(list(store.glob("*.safetensors"))) == 1
    assert not list(store.glob("*.lock"))


def test_waiting_for_another_process_can_be_interrupted(tmp_path):
    here, there = MentorStore(tmp_path), MentorStore(tmp_path)
    deciding, interrupts, told = {"architecture": "resnet8"}, Interrupts(), []
    with here.claim(deciding, told.append, interrupts):
        interrupts.received = 15
        with pytest.raises(Interrupted), there.claim(deciding, told.append, interrupts):
            pass
    assert told == ["waiting for resnet8, which another process is training"]
    with there.claim(deciding, told.append, interrupts):  # free again
        pass
    assert len(told) == 1


def test_a_training_is_claimed_whichever_epoch_it_is_wanted_from(tmp_path):
    here, there = MentorStore(tmp_path), MentorStore(tmp_path)
    stopped = Interrupts()
    stopped.received = 2
    early, late = ({"architecture": "resnet8", "epoch": epoch} for epoch in (3, 240))
    with here.claim(early, print, stopped), pytest.raises(Interrupted):
        there.claim(late, print, stopped).__enter__()


def test_a_claim_ends_though_a_forked_process_lives_on(tmp_path):
    """Workers of a loader that were forked within it have its file open."""
    store, nobody = MentorStore(tmp_path), Interrupts()
    with store.claim({"architecture": "resnet8"}, print, nobody):
        worker = os.fork()
        if worker == 0:
            signal.pause()
            os._exit(0)
    told = []
    with store.claim({"architecture": "resnet8"}, told.append, nobody):
        pass
    os.kill(worker, 9)
    os.waitpid(worker, 0)
    assert told == []


def test_where_files_cannot_be_locked(tmp_path, monkeypatch):
    """Some network file systems refuse."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    summary, _ = stored_run(tmp_path / "run")
    assert len(summary["results"]) == 3


def test_a_mentor_is_in_the_store_before_its_run_counts_it_as_done(tmp_path, store, monkeypatch):
    def killed(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(RunFolder, "finish_network", killed)
    with pytest.raises(RuntimeError, match="killed"):
        stored_run(tmp_path / "run")
    assert len(list(store.glob("*.json"))) == 1


def test_a_run_is_one_processs(tmp_path, monkeypatch):
    monkeypatch.setattr("classroomkd.runs.run_folder._PATIENCE", 0.2)
    first = RunFolder(tmp_path / "run", {})
    with pytest.raises(UserError, match=r"another process is using .*run: wait"):
        RunFolder(tmp_path / "run", {}, resume=True)
    first.close()
    RunFolder(tmp_path / "run", {}, resume=True).close()


# ---------------------------------------------------------------- what is kept


def test_the_weights_of_the_best_epoch_are_kept(tmp_path, monkeypatch, states_kept):
    """Best on the validation images; until the run's end beside the states, then by name."""
    after = {}
    train_epoch = Trainer.train_epoch

    def noted(self, on_step=None):
        record = train_epoch(self, on_step)
        after[self.name, record["epoch"]] = values_of(self.network)
        return record

    monkeypatch.setattr(Trainer, "train_epoch", noted)
    summary, _ = stored_run(tmp_path / "run", "training.epochs=4", "data.validation=0.12")
    chosen = [result["chosen_epoch"] for result in summary["results"][-2:]]
    assert min(chosen) < 4, "the last is the best: this shows nothing"
    for name, file, epoch in zip(
        ("resnet8 alone", CLASSROOM), ("student_alone", "student"), chosen, strict=True
    ):
        network, _, _ = load_network(tmp_path / "run" / f"{file}_best.safetensors")
        assert same(network.state_dict(), after[name, epoch])
    folder = tmp_path / "run" / "checkpoints" / "student-resnet8"
    assert [path.name for path in folder.glob("best-*")] == [f"best-{chosen[1]}.safetensors"]
    assert not list((tmp_path / "run" / "mentors").glob("*_best*"))


def test_no_epoch_is_chosen_on_the_test_images(tmp_path):
    stored_run(tmp_path / "run", "training.epochs=2", "data.validation=0")
    assert not list((tmp_path / "run").rglob("*best*"))


def test_as_many_states_are_kept_as_asked_for(tmp_path, states_kept):
    stored_run(tmp_path / "run", "training.epochs=4", "checkpoint_keep=3")
    folder = tmp_path / "run" / "checkpoints" / "student-resnet8"
    assert len(list(folder.glob("step-*.pt"))) == 3


# ---------------------------------------------------------------- what people see


def test_the_display_tells_what_each_mentor_does(tmp_path):
    stored_run(tmp_path / "run")
    record = records(tmp_path / "run")[-1]
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, color_system=None)
    with TrainingProgress(console) as progress:
        progress.begin_run(4)
        progress.begin("resnet8 in the classroom", 1, 2)
        progress.show(record)
    shown = text.getvalue()
    means = record["mentors"]["resnet8"]
    for number in (f"{means['active_share']:.1%}", f"{means['temperature']:.2f}"):
        assert number in shown
    assert f"task loss {record['task_loss']:.3f}" in shown


def test_methods_on_the_command_line(tmp_path, capsys):
    """No mentors for the student alone; a wrong option is one line.

    Names are printed as they are: rich has an emoji for ":five:", and markup in square brackets.
    """
    out = tmp_path / "run:five:[red]"
    run = ["train", "--data=digits", "--image-size=8", "--student=resnet8", "--epochs=1"]
    fast = ["training.batch_size=256", "data.loader=resident", "threads=1", "device=cpu"]
    assert cli.main([*run, "--out", str(out), "method=alone", *fast]) == 0
    printed = capsys.readouterr().out
    assert f"run in {out}" in printed
    assert f"report: {out / 'report.html'}" in printed
    assert "resnet8 alone" in printed
    assert "classroom" not in printed
    evaluate = ["evaluate", str(out), "--data", str(tmp_path)]
    assert cli.main(evaluate) == 2  # no images there, but a network
    assert "student" not in capsys.readouterr().err
    overrides = ["--mentors", "resnet8", "--out", "x", "method_options.temperature=3"]
    assert cli.main([*run, *overrides]) == 2
    assert "the classroom's options are under loss, not temperature" in capsys.readouterr().err


def test_a_line_now_and_then_without_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("classroomkd.runs.progress._QUIET", 0.0)
    _, text = stored_run(tmp_path / "run", "mentor_training.epochs=3", 'student=""')
    told = [line for line in text.splitlines() if line.startswith("resnet8 (mentor), epoch ")]
    assert [line.split(":")[0].split()[-1] for line in told] == ["1/3", "2/3", "3/3", "3"]
