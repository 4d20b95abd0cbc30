"""The commands, and what a newcomer reads when something is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from classroomkd import cli
from classroomkd.errors import OF_TRAIN
from classroomkd.loss import methods
from classroomkd.models import NetworkInfo, create, names, save_network
from classroomkd.reproduce.tables import TABLES
from classroomkd.runs.checkpoints import Checkpoints
from classroomkd.training.trainer import Trainer
from image_folders import write_classes
from patience import LAST_RESORT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    """A data set with train/ and val/."""
    root = tmp_path_factory.mktemp("split")
    write_classes(root / "train", 12)
    write_classes(root / "val", 5, seed=1)
    return root


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory) -> Path:
    """A data set that is split by seed."""
    return write_classes(tmp_path_factory.mktemp("one"), 20)


def network(path: Path, classes=("cat", "dog", "eel"), architecture: str = "resnet8") -> Path:
    """A checkpoint with info."""
    torch.manual_seed(0)
    info = NetworkInfo(architecture, list(classes), (0.5,) * 3, (0.25,) * 3, 8)
    save_network(path, create(architecture, len(classes)), info)
    return path


def train(data: Path, out: Path, *options: str, mentors=("resnet8",), student="resnet8") -> int:
    small = ["--epochs", "1", "--batch-size", "8", "--image-size", "8"]
    networks = ["--student", student, "--mentors", *map(str, mentors)]
    return cli.main(["train", "--data", str(data), "--out", str(out), *networks, *small, *options])


def error_of(capsys, status: int) -> str:
    """The message of a command that ended with ``status``, checked to be a newcomer's error."""
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("classroomkd: error: ")
    for unwanted in ("Traceback", "usage"):
        assert unwanted not in captured.err + captured.out
    return lines[0].removeprefix("classroomkd: error: ")


def measured(output: str) -> dict[str, float]:
    """The numbers that evaluate printed."""
    found = re.findall(r"^(images|top-1|top-5|loss) +([\d.]+|–)%?( .*)?$", output, re.MULTILINE)
    return {name: math.nan if value == "–" else float(value) for name, value, _ in found}


# ---------------------------------------------------------------- what works


@pytest.mark.slow
@pytest.mark.usefixtures("pages")
def test_the_quickstart_and_its_evaluation(tmp_path: Path, capsys, monkeypatch):
    """What it prints and leaves; ``.ci/run`` has it in a process of its own, as the README does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["quickstart", "--epochs", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    run = tmp_path / "runs" / "quickstart"
    assert captured.out.splitlines()[-1] == "report: runs/quickstart/report.html"
    assert "599 held-out images" in captured.out
    summary = json.loads((run / "summary.json").read_text())
    assert [(r["phase"], r["name"]) for r in summary["results"]] == [
        ("mentor", "resnet20"),
        ("mentor", "resnet14"),
        ("mentor", "resnet8"),
        ("alone", "resnet8"),
        ("student", "resnet8"),
    ]
    for result in summary["results"]:
        assert f"{result['top1']:.2%}" in captured.out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5
    config = yaml.safe_load((run / "config.yaml").read_text())
    data = config["data"]
    assert (data["test_share"], data["flip"], config["seed"]) == (1 / 3, False, 0)
    for name in ("config.yaml", "report.html", "student.safetensors", "student_alone.safetensors"):
        assert (run / name).stat().st_size > 0
    assert cli.main(["evaluate", str(run)]) == 0
    text = capsys.readouterr().out
    assert "images  599 of 1797 (held out by seed 0" in text
    assert f"top-1   {summary['results'][-1]['top1']:.2%}" in text
    assert 0 <= measured(text)["top-5"] <= 100


def checkpoint_of(out: Path) -> Path:
    """The student's last training state."""
    return Checkpoints(out / "checkpoints" / "student-resnet8").newest()


def test_train_then_evaluate_agree(split: Path, tmp_path: Path, capsys, states_kept):
    out = tmp_path / "run"
    assert train(split, out, "mentor_training.epochs=2", mentors=("resnet8", "mobilenetv2")) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"] == {
        "name": split.name,
        "classes": 3,
        "class_names": ["cat", "dog", "eel"],
        "train_images": 33,
        "validation_images": 3,
        "test_images": 15,
    }
    assert [r["epochs"] for r in summary["results"]] == [2, 2, 1, 1]
    capsys.readouterr()
    student = summary["results"][-1]
    checkpoint = checkpoint_of(out)
    for file in (out, out / "student.safetensors", checkpoint):
        assert cli.main(["evaluate", str(file), "--data", str(split)]) == 0
        numbers = measured(capsys.readouterr().out)
        assert numbers["images"] == 15
        assert numbers["top-1"] == pytest.approx(100 * student["top1"], abs=0.006)
        assert math.isnan(numbers["top-5"])  # of three classes it says nothing
        assert numbers["loss"] == pytest.approx(student["loss"], abs=6e-5)


def test_evaluate_measures_on_the_split_of_the_run(
    one_folder: Path, tmp_path: Path, capsys, states_kept
):
    out = tmp_path / "run"
    assert train(one_folder, out, "--seed", "5", "data.test_share=0.3") == 0
    loss = json.loads((out / "summary.json").read_text())["results"][-1]["loss"]
    capsys.readouterr()
    for file in (out, out / "student.safetensors", checkpoint_of(out)):
        assert cli.main(["evaluate", str(file), "--data", str(one_folder)]) == 0
        numbers = measured(capsys.readouterr().out)
        assert (numbers["images"], numbers["loss"]) == (18, pytest.approx(loss, abs=6e-5))
        assert cli.main(["evaluate", str(file)]) == 0  # likewise, on the run's own images
        output = capsys.readouterr().out
        assert f"on the held-out part of {one_folder}, as in its run:\n" in output
        assert measured(output) == numbers
    # Elsewhere the defaults hold, and the command line overrides both.
    (tmp_path / "copy.safetensors").write_bytes((out / "student.safetensors").read_bytes())
    for file, options, images in (
        (tmp_path / "copy.safetensors", [], 12),
        (out, ["--test-share", "0.5"], 30),
    ):
        assert cli.main(["evaluate", str(file), "--data", str(one_folder), *options]) == 0
        assert measured(capsys.readouterr().out)["images"] == images


def test_evaluate_without_data_needs_a_run_whose_images_are_there(tmp_path, capsys):
    data, out = write_classes(tmp_path / "data", 4), tmp_path / "run"
    assert train(data, out, "alone=false") == 0
    torch.save(create("resnet8", 3).state_dict(), out / "theirs.pth")
    (tmp_path / "copy.safetensors").write_bytes((out / "student.safetensors").read_bytes())
    data.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    message = error_of(capsys, cli.main(["evaluate", str(out)]))
    assert message == f"the images of the run are no longer at {data}: give --data"
    (tmp_path / "elsewhere").rename(data)
    message = error_of(capsys, cli.main(["evaluate", str(out / "theirs.pth")]))
    assert "theirs.pth lies in a run folder but was not written by the run" in message
    message = error_of(capsys, cli.main(["evaluate", str(tmp_path / "copy.safetensors")]))
    assert "--data is required" in message
    assert "copy.safetensors lies in no run folder" in message


def test_evaluate_of_a_foreign_checkpoint_says_what_it_assumes(split, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save({"state_dict": create("resnet8", 3).state_dict()}, tmp_path / "theirs.pth")
    assert cli.main(["evaluate", str(tmp_path / "theirs.pth"), "--data", str(split)]) == 0
    output = capsys.readouterr().out
    assert "does not say how its images were prepared" in output
    assert measured(output)["images"] == 15


def test_mentors_from_files_and_run_folders(split: Path, tmp_path: Path, capsys):
    first = tmp_path / "first"
    assert train(split, first) == 0
    mentors = (first / "mentors" / "resnet8.safetensors", first)
    assert train(split, tmp_path / "second", mentors=mentors) == 0
    results = {
        name: json.loads((tmp_path / name / "summary.json").read_text())["results"]
        for name in ("first", "second")
    }
    taught = results["first"][-1] | {"phase": "mentor", "name": "resnet8-2"}
    for result, own in zip(results["second"], (results["first"][0], taught), strict=False):
        assert not result["trained"]
        own = {name: value for name, value in own.items() if name in result}
        assert result == own | {"trained": False, "epochs": None}


def test_evaluate_says_which_images_it_measures(split, one_folder, tmp_path, capsys):
    file = network(tmp_path / "a.safetensors")
    losses = []
    for data, options, line in (
        (split, [], "15"),
        (split, ["--all"], "51"),
        (one_folder, [], "12 of 60 (held out by seed 0; --all measures every image)"),
        (one_folder, ["--all"], "60"),
        (one_folder, ["--all", "--seed", "4"], "60"),
    ):
        assert cli.main(["evaluate", str(file), "--data", str(data), *options]) == 0
        output = capsys.readouterr().out
        assert f"images  {line}\n" in output
        assert ("held-out part" in output) == ("--all" not in options)
        losses.append(measured(output)["loss"])
    assert losses[-1] == pytest.approx(losses[-2], abs=2e-4)  # all are all, however split


def test_report_of_one_run_and_of_two(split: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in ("0", "1"):
        assert train(split, tmp_path / f"run{seed}", "--seed", seed) == 0
    (tmp_path / "run0" / "report.html").unlink()
    capsys.readouterr()
    assert cli.main(["report", "run0"]) == 0
    assert capsys.readouterr().out == "report: run0/report.html\n"
    assert (tmp_path / "run0" / "report.html").stat().st_size > 0
    assert cli.main(["report", "run0", "run1"]) == 0
    assert capsys.readouterr().out == "report: comparison.html\n"
    assert cli.main(["report", "absent"]) == 2
    assert "no run folder at absent" in capsys.readouterr().err


def test_models_lists_the_zoo(capsys):
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"resnet20 +278,324\n", text)
    assert re.findall(r"^(\w+) +[\d,]+$", text, re.MULTILINE) == names()


def test_help_of_train_names_the_zoo(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    listed = capsys.readouterr().out.split("\nnetworks:\n")[1]
    assert re.findall(r"^  (\S+)", listed, re.MULTILINE) == [
        *("NAME", "tv:NAME", "timm:NAME", "FILE.py:NAME", "NAME=WEIGHTS", "NAME@60", "PATH")
    ]
    zoo = re.search(r"from the zoo: ([\w\s,]+)\n  tv:", listed)
    assert re.findall(r"\w+", zoo[1]) == names()


def test_methods_lists_them_with_their_options(capsys):
    assert cli.main(["methods"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^method=(\w+)$", text, re.MULTILINE) == methods.names()
    of_at = text.split("method=at\n")[1]
    assert "Paying More Attention to Attention" in of_at
    for part in ("Only the first mentor teaches.", "method_options.beta=1000.0  (a number)"):
        assert part in of_at
    assert "loss.ranking=sample  (sample or batch)" in text


def test_config_lists_the_values_of_a_recipe(tmp_path, capsys):
    assert cli.main(["config"]) == 0
    defaults = capsys.readouterr().out
    assert "\ntraining.epochs=240  (a whole number)\n    Training epochs; " in defaults
    assert "\ndata.padding=null  (a whole number or null)\n" in defaults
    (tmp_path / "own.yaml").write_text("{method: kd, mentors: [vgg8@9], training: {epochs: 30}}")
    assert cli.main(["config", str(tmp_path / "own.yaml")]) == 0
    own = capsys.readouterr().out
    for line in ("training.epochs=30", "mentors=[vgg8@9]", "method_options.temperature=4.0"):
        assert f"\n{line}  (" in own
    assert cli.main(["config", "small-larg-batch"]) == 2
    assert "the nearest are small-large-batch" in capsys.readouterr().err


def without_torch(*commands: str, cwd: Path) -> list[tuple[int, str, str]]:
    """Status and output of each, where torch, and what else takes long, cannot be imported."""
    blocked = ("torch", "torchvision", "triton", "numba", "sklearn", "timm", "matplotlib", "ffcv")
    code = f"""
import contextlib, io, json, sys
sys.modules |= dict.fromkeys({blocked})
from classroomkd.cli import main
for command in {commands}:
    outputs = out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(command.split())
        except SystemExit as ended:
            status = ended.code
    print(json.dumps((status, *(output.getvalue() for output in outputs))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=LAST_RESORT
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


WITHOUT_TORCH = [
    "--help",
    "--version",
    "train --help",
    "reproduce --help",
    "data pack --help",
    "recipes",
    "models",
    "methods",
    "config",
    "config cifar100/large-batch",
    *(f"reproduce {table} --plan" for table in TABLES),
    "reproduce main --plan --devices cpu cpu --classrooms small --seeds 0",
]


def test_what_needs_no_torch_does_not_import_it(tmp_path):
    results = without_torch(*WITHOUT_TORCH, cwd=tmp_path)
    for command, (status, out, err) in zip(WITHOUT_TORCH, results, strict=True):
        assert (status or 0, err) == (0, ""), command
        assert out, command


BAD_PATHS = [
    ("report nope", "no run folder at nope"),
    ("train", "--data and --student and --mentors are required, here or in a --recipe"),
    ("train --data {data} method=alone", "--student is required, here or in a --recipe"),
    ("train --data absent {networks}", "no such folder: {cwd}/absent"),
    ("train --data cifar {networks}", "no such folder: {cwd}/cifar: --download cifar100 makes"),
    ("train --data {data} --student resnet8 --mentors a/b.pt", "there is no checkpoint a/b.pt"),
    ("train --data {data} --student resnet9 --mentors resnet8", "called 'resnet9'; the nearest"),
    ("train --data {data} {networks} --out used", "used is not empty"),
    ("train --data {data} {networks} temperature=4", "did you mean loss.temperature=4?"),
    ("train --data {data} {networks} loss.temperature=0", "temperature must be"),
    ("train --method kd", "given as method=kd (see"),
    ("train --resume absent", "no run to resume in absent"),
    ("mentors --data absent --mentors resnet8 --at-once 2", "no such folder: {cwd}/absent"),
    ("evaluate absent --data {data}", "there is no checkpoint absent"),
    ("evaluate used --data absent", "no such folder: absent"),
    ("evaluate used", "--data is required: used lies in no run folder"),
    ("reproduce main --data absent", "data info {cwd}/absent --download cifar100 makes it"),
    ("data info absent", "no such folder: absent"),
]


def test_a_bad_path_is_found_without_torch(split, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    values = {"data": split, "cwd": tmp_path, "networks": "--student resnet8 --mentors resnet20"}
    commands = [command.format(**values) for command, _ in BAD_PATHS]
    results = without_torch(*commands, cwd=tmp_path)
    for (command, message), (status, out, err) in zip(BAD_PATHS, results, strict=True):
        assert (status, out) == (2, ""), command
        assert message.format(**values) in err, command
        assert len(err.splitlines()) == 1, command


def test_the_package_itself_takes_nothing_and_its_loss_torch_alone():
    code = """
import sys
import classroomkd
assert "torch" not in sys.modules
assert {*classroomkd.__all__} <= {*dir(classroomkd)}
loss = classroomkd.fused_classroom_loss
assert "torch" in sys.modules
others = {"triton", "numba", "torchvision", "omegaconf", "PIL", "ffcv", "sklearn", "matplotlib"}
assert not (others | {"safetensors", "rich"}) & {*sys.modules}
from classroomkd import *
from classroomkd.loss.fused import fused_classroom_loss as its
assert fused_classroom_loss is loss is its and ClassroomLoss().options.temperature == 12
import pickle, torch
report = ClassroomReport(*torch.zeros(7))
assert type(pickle.loads(pickle.dumps(report))) is ClassroomReport
try:
    classroomkd.fused_loss
except AttributeError as error:
    assert "module 'classroomkd' has no attribute 'fused_loss'" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LAST_RESORT
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "package", ["classroomkd", *(f"classroomkd.{name}" for name in ("loss", "models"))]
)
def test_every_name_of_a_package_is_there(package):
    module = import_module(package)
    assert all(hasattr(module, name) for name in module.__all__)


def test_output_that_is_not_read_to_its_end(split: Path, tmp_path: Path):
    file = network(tmp_path / "a.safetensors")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "classroomkd", "evaluate", file, "--data", split],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=LAST_RESORT,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# ---------------------------------------------------------------- what a newcomer gets wrong


def test_mentor_of_another_number_of_classes(split: Path, tmp_path: Path, capsys):
    mentor = network(tmp_path / "two.safetensors", classes=("cat", "dog"))
    message = error_of(capsys, train(split, tmp_path / "run", mentors=("resnet8", mentor)))
    assert str(mentor) in message
    assert "2 classes" in message
    assert "has 3" in message


def test_student_of_another_number_of_classes(split: Path, tmp_path: Path, capsys):
    student = network(tmp_path / "two.safetensors", classes=("cat", "dog"))
    message = error_of(capsys, cli.main(["evaluate", str(student), "--data", str(split)]))
    assert "2 classes" in message
    assert "has 3" in message


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "many"], "many"),
        (["--batch-size", "-1"], "--batch-size"),
        (["loss.temperature=0"], "temperature must be"),
        (["loss.temperature=nan"], "temperature must be"),
        (["loss.temperature=40.1"], "temperature must be"),
        (["--image-size", "1025"], "--image-size"),
        (["--image-size", "1000000000000"], "--image-size"),
        (["--data", ""], "--data"),
        (["--out", ""], "--out"),
        (["training.learning_rate=inf"], "training.learning_rate"),
        (["data.test_share=1"], "data.test_share"),
        (["--seed", "-1"], "--seed"),
        (["loss.ranking=class"], "class"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "meta"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--sudent", "x"], "--sudent"),
        (["--student", "vgg8", "--image-size", "1"], "vgg8"),
        (["--student", "resnet8", "--image-size", "1", "--batch-size", "1"], "--batch-size"),
    ],
)
def test_values_that_cannot_be(split: Path, tmp_path: Path, capsys, options, part):
    assert part in error_of(capsys, train(split, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", ["quickstart", "train", "mentors", "recipes", "data info x", "reproduce main"]
)
def test_an_unknown_option_points_to_its_command(capsys, command):
    message = error_of(capsys, cli.main([*command.split(), "--nonsense"]))
    name = command.removesuffix(" x").removesuffix(" main")
    assert message == f"unrecognized arguments: --nonsense (see classroomkd {name} --help)"


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("train --method kd", "recipe values are given as method=kd"),
        ("train --mentors resnet8 --cutout=8", "given as data.cutout=8"),
        (
            "train --weight-decay 1e-4",
            "given as training.weight_decay=1e-4 or mentor_training.weight_decay=1e-4",
        ),
        ("train --loss.weighting", "given as loss.weighting=VALUE"),
        ("mentors --mentor-seed 3", "given as mentor_seed=3"),
        ("train --schedul cosine", "given as training.schedule=cosine or mentor_training."),
        ("reproduce main --temperature 4", "given as loss.temperature=4"),
        ("reproduce main --method kd", "did you mean --methods?"),
        ("train --sudent x", "did you mean --student?"),
        ("quickstart --epoch 3", "did you mean --epochs?"),
        ("data info x --image-sise 8", "did you mean --image-size?"),
    ],
)
def test_an_unknown_option_hints_at_what_was_meant(capsys, command, hint):
    message = error_of(capsys, cli.main(command.split()))
    assert message.startswith("unrecognized arguments: --")
    assert hint in message


def test_a_table_is_all_that_reproduce_wants(capsys):
    assert "required: TABLE (see" in error_of(capsys, cli.main(["reproduce"]))


@pytest.mark.usefixtures("pages")
def test_resuming_a_finished_run_writes_its_page_if_that_is_missing(split, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(split, out, "alone=false") == 0
    assert "is finished" in error_of(capsys, cli.main(["train", "--resume", str(out)]))
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out


def test_what_cannot_be_resumed(split, tmp_path, capsys):
    out = tmp_path / "run"
    resume = ["train", "--resume", str(out)]
    message = error_of(capsys, cli.main([*resume, "seed=3", "--epochs", "2"]))
    assert "leave out --epochs, KEY=VALUE" in message
    assert f"no run to resume in {out}" in error_of(capsys, cli.main(resume))
    assert train(split, out, "alone=false") == 0
    (out / "summary.json").unlink()
    for damaged in ("checkpoints/student-resnet8/done.json", "inputs.json"):
        (out / damaged).write_text("{")
        assert f"{out / damaged} is damaged" in error_of(capsys, cli.main(resume))


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["evaluate"]])
def test_incomplete_command(capsys, arguments):
    assert "--help" in error_of(capsys, cli.main(arguments))


def test_interruption(split: Path, tmp_path: Path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", interrupt)
    assert train(split, tmp_path / "run") == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("classroomkd: interrupted: ")
    assert str(tmp_path / "run") in lines[0]


def test_interruption_before_anything_is_written(split: Path, tmp_path: Path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("classroomkd.runs.images.load_parts", interrupt)
    assert train(split, tmp_path / "run") == 130
    assert capsys.readouterr().err == "classroomkd: interrupted: nothing was written\n"


def test_full_disk(split: Path, tmp_path: Path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("classroomkd.runs.training_run.write_report", refuse)
    message = error_of(capsys, train(split, tmp_path / "run"))
    assert message.startswith(f"{tmp_path / 'run'}: No space left on device: free some space")
    assert "intact" in message
    assert (tmp_path / "run" / "summary.json").is_file()


def test_refusals_of_the_system(split: Path, tmp_path: Path, capsys):
    long = tmp_path / ("a" * 300)
    assert str(long) in error_of(capsys, train(long, tmp_path / "run"))
    assert str(long) in error_of(capsys, train(split, long))
    status = cli.main(["evaluate", f"{long}/x.pt", "--data", str(split)])
    assert f"{long}/x.pt" in error_of(capsys, status)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_folders_without_permission(split: Path, tmp_path: Path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir()
    write_classes(tmp_path / "data", 4)
    locked.chmod(0)
    (tmp_path / "data" / "dog").chmod(0)
    file = network(tmp_path / "a.safetensors")
    for run, named in (
        (lambda: train(split, locked / "run"), locked / "run"),
        (lambda: train(locked, tmp_path / "run"), locked),
        (lambda: train(tmp_path / "data", tmp_path / "run"), tmp_path / "data" / "dog"),
        (lambda: cli.main(["evaluate", f"{locked}/x.pt", "--data", str(split)]), locked / "x.pt"),
        (lambda: cli.main(["evaluate", str(file), "--data", str(locked)]), locked),
    ):
        message = error_of(capsys, run())
        assert "Permission denied" in message
        assert str(named) in message


@pytest.mark.parametrize("options", [[], ["--all"]])
def test_network_whose_loss_is_not_finite(split: Path, tmp_path: Path, capsys, options):
    torch.manual_seed(0)
    sick = create("resnet8", 3)
    nn.init.constant_(sick.fc.bias, math.nan)
    info = NetworkInfo("resnet8", ["cat", "dog", "eel"], (0.5,) * 3, (0.25,) * 3, 8)
    save_network(tmp_path / "sick.safetensors", sick, info)
    arguments = ["evaluate", str(tmp_path / "sick.safetensors"), "--data", str(split), *options]
    message = error_of(capsys, cli.main(arguments))
    assert message.startswith(f"{tmp_path / 'sick.safetensors'}: its loss on the images is nan")


@pytest.mark.parametrize("command", ["train --data x --student resnet8", "report x", "recipes"])
def test_a_command_without_its_packages_says_what_to_install(command):
    """As after `pip install classroomkd`, which installs what the loss needs."""
    code = (
        "import sys\n"
        "for name in ('omegaconf', 'matplotlib', 'rich', 'yaml', 'PIL', 'safetensors', "
        "'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "from classroomkd.cli import main\n"
        f"sys.exit(main({command.split()!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LAST_RESORT
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith('which is not installed: pip install "classroomkd[train]"')


def test_distill_without_its_packages_says_what_to_install():
    code = "import sys; sys.modules['rich'] = None; from classroomkd import distill"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LAST_RESORT
    )
    said = (
        'classroomkd.distill needs rich, which is not installed: pip install "classroomkd[train]"'
    )
    assert done.stderr.splitlines()[-1] == said


def test_the_modules_of_train_are_what_setup_installs():
    required = {
        re.match(r"[\w-]+", requirement)[0].lower()
        for requirement in metadata.requires("classroomkd")
        if re.search(r"extra == .train\b", requirement)
    }
    distributions = metadata.packages_distributions()
    assert {name.lower() for of in OF_TRAIN for name in distributions[of]} == required
