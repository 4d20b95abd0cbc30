"""Runs that are killed and taken up again end where they would have ended."""

import filecmp
import io
import json
import os
import re
import signal
import textwrap
import time
from contextlib import nullcontext

import pytest
import torch
import yaml
from rich.console import Console

from classroomkd import cli
from classroomkd.errors import UserError
from classroomkd.report.records import read_run
from classroomkd.runs.checkpoints import Checkpoints, Saver
from classroomkd.runs.interrupts import Interrupted
from classroomkd.runs.recipe import load_recipe, to_dict
from classroomkd.runs.run_folder import RunFolder
from classroomkd.runs.training_run import TrainingRun
from image_folders import write_classes
from processes import COMMAND, Running
from small_runs import colours, recipe

FILES = ("student.safetensors", "student_alone.safetensors", "mentors/resnet8.safetensors")

# A process that has trained nothing itself, so that the children it forks can.
PREAMBLE = """
    import os, random, re, shutil, signal, sys, time
    from pathlib import Path
    from rich.console import Console
    from small_runs import colours, recipe
    from classroomkd.runs.builder import Builder
    from classroomkd.runs.training_run import TrainingRun
    import classroomkd.files

    Builder.check_trainable = lambda *_: None  # which is not what is interrupted here
    OUT = Path(sys.argv[1])
    RECIPE = recipe(
        "mentors=[resnet8]", "training.epochs=4", "checkpoint_minutes=0.0003", "data.validation=0.1"
    )
    SETS = colours(64), colours(13, seed=1)

    def hold():
        with open(os.devnull, "w") as nothing:
            resume = (OUT / "inputs.json").exists()
            TrainingRun(RECIPE, Console(file=nothing)).run(*SETS, OUT, resume=resume)

    def child(before=lambda: None):
        pid = os.fork()
        if pid == 0:
            try:
                before()
                hold()
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        return pid

    def ended(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(code, out):
    """Run ``code`` after the preamble; returns what it prints."""
    result = Running(textwrap.dedent(PREAMBLE) + textwrap.dedent(code), out).wait()
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run("assert ended(child()) == 0", out)
    return out


def assert_same(out, undisturbed):
    for file in FILES:
        # Not of the bytes themselves, whose differences pytest would spell out for minutes in CI.
        assert filecmp.cmp(out / file, undisturbed / file, shallow=False), file
    kept = {}
    for folder in (out, undisturbed):
        summary = json.loads((folder / "summary.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            del line["seconds"], line["images_per_second"]
        kept[folder] = summary["results"], lines
    assert kept[out] == kept[undisturbed]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, undisturbed):
    """SIGKILL six times, each soon after two writes, whatever the process is doing."""
    out = tmp_path / "run"
    printed = run(
        """
        def files():
            return {path.name for path in OUT.glob("checkpoints/*/*")}  # of every step another

        draw = random.Random(0)
        kills, code = 0, None
        while kills < 6 and code != 0:
            seen, times, pid = files(), [], child()
            alive = os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            while len(times) < 2 and os.waitid(*alive) is None:
                time.sleep(0.001)
                if files() != seen:
                    seen = files()
                    times.append(time.monotonic())
            if len(times) == 2:  # then about as long again, however fast the machine is
                time.sleep(draw.uniform(0, 2) * (times[1] - times[0]))
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            assert code in (0, -signal.SIGKILL), code
            kills += code != 0
        if code != 0:
            assert ended(child()) == 0
        print(kills)
        """,
        out,
    )
    assert int(printed) >= 3
    assert_same(out, undisturbed)


@pytest.mark.slow
def test_killed_during_every_kind_of_write(tmp_path, undisturbed):
    """Once at the first sync and once at the first rename of each kind of file."""
    out = tmp_path / "run"
    printed = run(
        """
        NOTED = OUT.parent / "noted"  # the kinds of write at which a process has died
        NOTED.touch()

        def dying():
            for name in ("fsync", "replace"):
                def wrapped(*arguments, name=name, do=getattr(os, name)):
                    if name == "fsync":  # of .FILE.RANDOM.unfinished, which is then renamed
                        file = Path(os.readlink(f"/proc/self/fd/{arguments[0]}")).stem
                        file = file.removeprefix(".").rpartition(".")[0]
                    else:
                        file = Path(arguments[1]).name
                    # Whatever the network and the step.
                    kind = name + " " + re.sub("_alone|-[0-9].*", "", file)
                    if kind not in NOTED.read_text().splitlines():
                        with NOTED.open("a") as noted:
                            noted.write(kind + "\\n")
                        os.kill(os.getpid(), signal.SIGKILL)
                    return do(*arguments)
                setattr(classroomkd.files.os, name, wrapped)

        while code := ended(child(dying)):
            assert code == -signal.SIGKILL, code
            if not (OUT / "inputs.json").exists() and OUT.exists():
                shutil.rmtree(OUT)  # killed before there was anything to go on with
        print(NOTED.read_text())
        """,
        out,
    )
    files = {line.split()[1] for line in printed.splitlines() if line}
    assert files >= {"inputs.json", "metrics.jsonl", "step", "student.safetensors", "summary.json"}
    assert_same(out, undisturbed)
    assert not [path for path in out.rglob(".*") if path.is_file()]  # half-written files


@pytest.fixture(scope="module")
def tiny_training(tmp_path_factory):
    """Options of the command that trains a tiny classroom, and the folder of the whole run."""
    folder = tmp_path_factory.mktemp("tiny")
    for part, count in (("train", 20), ("val", 5)):
        write_classes(folder / "data" / part, count, seed=count)
    options = ["--data", str(folder / "data"), "--student", "resnet8", "--mentors", "resnet8"]
    options += ["--epochs", "2", "--batch-size", "8", "--image-size", "8", "--loader", "resident"]
    options += ["mentor_training.epochs=25", "alone=false", "store=false", "threads=1"]
    assert cli.main(["train", *options, "--out", str(folder / "whole")]) == 0
    return options, folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_first(tmp_path, monkeypatch, capsys, tiny_training, number):
    """In the middle of an epoch, from the command line; the exit status tells which it was."""
    options, whole = tiny_training
    process = Running(COMMAND, "train", *options, "--out", "run", cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n")) and process.running:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.wait()
    assert process.returncode == 128 + number, process.stderr
    assert "classroomkd train --resume run continues" in process.stderr
    state = Checkpoints(tmp_path / "run" / "checkpoints" / "mentor-resnet8").load(print)
    assert 1 <= len(state["records"]) < 25
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume", "run"]) == 0
    for file in ("student.safetensors", "mentors/resnet8.safetensors"):
        assert filecmp.cmp(tmp_path / "run" / file, whole / file, shallow=False), file
    capsys.readouterr()
    assert cli.main(["train", "--resume", "run"]) == 2
    assert "is finished" in capsys.readouterr().err


# ---------------------------------------------------------------- checkpoints


def test_the_last_few_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 30, 200):
        checkpoints.save({"step": step, "weights": torch.full((3,), float(step))}, step)
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.load(print)["step"] == 200
    assert checkpoints.newest().name.startswith("step-000000200-")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save({"step": step, "weights": torch.full((300,), float(step))}, step)
    newest = checkpoints.newest()
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    newest.write_bytes(content[: {"cut": len(content) - 1, "flip": None, "empty": 0}[damage]])
    warnings = []
    assert checkpoints.load(warnings.append)["step"] == 1
    assert warnings == [f"{newest} is damaged: using the previous one"]


def test_no_checkpoint_yet(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").load(print) is None
    assert Checkpoints(tmp_path / "nowhere").newest() is None


def test_a_run_does_not_go_on_with_other_inputs(tmp_path):
    def hold(train_set, resume):
        with open(os.devnull, "w") as nothing:
            classroom = TrainingRun(recipe(), Console(file=nothing))
            return classroom.run(train_set, colours(13, seed=1), tmp_path / "run", resume=resume)

    hold(colours(28), resume=False)
    with pytest.raises(UserError, match="the train images changed since"):
        hold(colours(28, seed=5), resume=True)


def test_epochs_recorded_before_the_first_state_come_once(tmp_path, monkeypatch):
    """A process may die after an epoch's record and before anything was saved."""
    out = tmp_path / "run"

    def hold(resume):
        with open(os.devnull, "w") as nothing:
            short = recipe("mentors=[resnet8]", "checkpoint_epochs=3")
            sets = colours(28), colours(13, seed=1)
            return TrainingRun(short, Console(file=nothing)).run(*sets, out, resume=resume)

    def die(_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "after_epoch", die)
        with pytest.raises(RuntimeError, match="killed"):
            hold(resume=False)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    hold(resume=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        (phase, epoch) for phase in ("mentor", "alone", "student") for epoch in (1, 2)
    ]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ((2, 0), "resnet8 alone: resuming from epoch 2"),
        ((2, 2), "resnet8 alone: resuming from epoch 2, batch 3 of 4"),
    ],
)
def test_a_resumed_run_says_from_where(tmp_path, monkeypatch, place, line):
    def hold(resume):
        said = io.StringIO()
        classroom = TrainingRun(recipe("mentors=[]", "method=alone"), Console(file=said, width=200))
        sets = colours(32), colours(13, seed=1)
        try:
            classroom.run(*sets, tmp_path / "run", resume=resume)
        finally:
            told = [line.strip() for line in said.getvalue().splitlines()]
        return [line for line in told if "resuming" in line]

    between_steps = Saver.between_steps

    def interrupted(saver):
        if (saver.trainer.epoch, saver.trainer.batch) == place:
            saver.interrupts.received = signal.SIGTERM
        between_steps(saver)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "between_steps", interrupted)
        with pytest.raises(Interrupted):
            hold(resume=False)
    assert hold(resume=True) == [line]


def test_states_go_when_the_network_is_safe(tmp_path, monkeypatch):
    """And with the next process, where this one died before they were gone."""
    out = tmp_path / "run"

    def hold(resume):
        with open(os.devnull, "w") as nothing:
            sets = colours(28), colours(13, seed=1)
            return TrainingRun(recipe("mentors=[]", "method=alone"), Console(file=nothing)).run(
                *sets, out, resume=resume
            )

    def die(checkpoints):
        assert (checkpoints.folder / "done.json").exists()
        assert checkpoints.newest() is not None
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "clear", die)
        with pytest.raises(RuntimeError, match="killed"):
            hold(resume=False)
    assert list(out.rglob("step-*.pt"))
    hold(resume=True)
    assert not list(out.rglob("step-*.pt"))


@pytest.mark.parametrize("key", ["method", "records", "optimizer"])
def test_a_state_of_another_version_is_named(tmp_path, monkeypatch, key):
    out, short = tmp_path / "run", recipe("mentors=[]", "method=alone")

    def hold(resume):
        with open(os.devnull, "w") as nothing:
            sets = colours(28), colours(13, seed=1)
            return TrainingRun(short, Console(file=nothing)).run(*sets, out, resume=resume)

    def die(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_network", die)
        with pytest.raises(RuntimeError, match="killed"):
            hold(resume=False)
    checkpoints = Checkpoints(out / "checkpoints" / "alone-resnet8")
    state = checkpoints.load(print)
    del state[key]
    checkpoints.save(state, 1000)
    message = f"the training states in {checkpoints.folder} are of another version and lack {key}:"
    with pytest.raises(UserError, match=re.escape(message)):
        hold(resume=True)


def test_a_finished_run_keeps_no_training_states(undisturbed):
    """Only what tells that its networks are done."""
    kept = {path.name for path in (undisturbed / "checkpoints").rglob("*") if path.is_file()}
    assert kept == {"done.json"}


def make_old(out):
    """Turn a run folder into one of the version in which the student's phase was "classroom"."""

    def old(text):
        return text.replace('"phase": "student"', '"phase": "classroom"')

    folder = (out / "checkpoints" / "student-resnet8").rename(
        out / "checkpoints" / "classroom-resnet8"
    )
    (out / "tensorboard" / "student").rename(out / "tensorboard" / "classroom")
    for file in (out / "metrics.jsonl", *folder.glob("done.json"), *out.glob("summary.json")):
        file.write_text(old(file.read_text()))
    checkpoints = Checkpoints(folder, keep=1)
    if state := checkpoints.load(print):
        state["records"] = json.loads(old(json.dumps(state["records"])))
        checkpoints.save(state, 1000)


@pytest.mark.parametrize("place", ["within the student's training", "before the summary", "done"])
def test_a_run_of_an_earlier_version_is_read_and_resumed(tmp_path, monkeypatch, place):
    pytest.importorskip("tensorboard")
    short = recipe("mentors=[resnet8]", "alone=false", "tensorboard=true")
    between_steps = Saver.between_steps

    def start(out, resume=False):
        sets = colours(28), colours(13, seed=1)
        return TrainingRun(short, Console(file=io.StringIO())).run(*sets, out, resume=resume)

    def stop_in_the_second_epoch(saver):
        if saver.keeps_best and (saver.trainer.epoch, saver.trainer.batch) == (2, 1):
            saver.interrupts.received = signal.SIGTERM
        between_steps(saver)

    def stop(*_):
        raise KeyboardInterrupt

    whole, out = start(tmp_path / "whole"), tmp_path / "run"
    with monkeypatch.context() as patch:
        if place == "within the student's training":
            patch.setattr(Saver, "between_steps", stop_in_the_second_epoch)
        elif place == "before the summary":
            patch.setattr(RunFolder, "finish", stop)
        with nullcontext() if place == "done" else pytest.raises(KeyboardInterrupt):
            start(out)
    make_old(out)
    read = read_run(out)
    assert [record["epoch"] for record in read.classroom] == (
        [1] if place == "within the student's training" else [1, 2]
    )
    if place == "done":
        assert read.summary["results"] == whole["results"]
        return
    assert start(out, resume=True)["results"] == whole["results"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["mentor", "mentor", "student", "student"]
    assert not list(out.rglob("*classroom*"))
    assert list((out / "tensorboard" / "student").rglob("events*"))


def test_a_run_of_an_earlier_version_goes_on_as_it_began(tmp_path, monkeypatch):
    """Its config.yaml has no key for the mentors' weight, which was the paper's 1."""
    values = to_dict(load_recipe(values={"student": "resnet8", "data": {"source": "digits"}}))
    del values["loss"]["mentor_weight"], values["training"]["clip_norm"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    begun = []

    def instead(recipe):
        begun.append(recipe)
        raise UserError("enough")

    monkeypatch.setattr("classroomkd.cli.train._run_of", instead)
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert cli.main(["train", "--data", "digits", "--student", "resnet8", "method=alone"]) == 2
    old, new = begun
    assert (old.loss.mentor_weight, old.training.clip_norm) == (None, None)
    assert new.loss.mentor_weight == "auto"
