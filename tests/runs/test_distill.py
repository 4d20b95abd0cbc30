"""`classroomkd.distill`: modules and data given in Python, trained as from the command line."""

from __future__ import annotations

import copy
import json
import os
import signal

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import refusals
from classroomkd import cli, distill
from classroomkd.models import create
from classroomkd.runs.recipe import load_recipe
from classroomkd.runs.training_run import TrainingRun
from classroomkd.training.trainer import Trainer
from small_runs import colours, same, values_of

SETTINGS = {"training": {"batch_size": 8}, "threads": 1, "store": False, "quiet": True}
SETTINGS |= {"device": "cpu", "seed": 3}


def perceptron(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 4))


def named(loader: DataLoader) -> DataLoader:
    """The same, whose classes have names."""
    loader.dataset.classes = ["a", "b", "c", "d"]
    return loader


def points(count: int, seed: int, **options) -> DataLoader:
    """Vectors whose class is a linear function of them."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 12, generator=random)
    weights = torch.randn(12, 4, generator=torch.Generator().manual_seed(9))
    return DataLoader(TensorDataset(inputs, (inputs @ weights).argmax(1)), **options)


def train() -> DataLoader:
    return points(90, 1, batch_size=16, shuffle=True)


def test_() -> DataLoader:
    return points(40, 2, batch_size=20)


test_.__test__ = False


def refusal(*arguments, **options) -> str:
    return refusals.refusal(distill, *arguments, **{"epochs": 1, **options})


def test_image_sets_give_the_very_weights_of_the_command_line(tmp_path, capsys):
    """A named student, the same mentor as a module and as a file, one recipe."""
    sets = colours(40), colours(13, 1)
    torch.manual_seed(0)
    mentor = create("resnet8", 3)
    before = values_of(mentor)
    data = {"validation": 0.0, "loader": "resident"}
    options = {**SETTINGS, "data": data, "epochs": 2, "quiet": False}
    student, summary = distill("resnet8", {"teacher": mentor}, *sets, **options)
    assert "run in" not in capsys.readouterr().out  # that folder is gone
    assert same(values_of(mentor), before)
    assert not student.training
    torch.save(mentor.state_dict(), tmp_path / "w.pth")
    recipe = load_recipe(
        values={
            "student": "resnet8",
            "mentors": [{"source": "resnet8", "weights": str(tmp_path / "w.pth")}],
            "training": {"epochs": 2, "batch_size": 8},
            "data": {**data, "image_size": 8},
            "alone": False,
            **{key: SETTINGS[key] for key in ("threads", "store", "device", "seed")},
        }
    )
    run = TrainingRun(recipe, Console(quiet=True))
    other = run.run(*sets, tmp_path / "run")
    assert same(values_of(student), values_of(run.students["student"]))
    assert summary["results"][-1] == other["results"][-1]
    assert [result["name"] for result in summary["results"]] == ["teacher", "resnet8"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("alone", {}),
        ("classroom", {"loss": {"temperature": 4.0}}),
        ("kd", {"method_options": {"temperature": 2.0}}),
        ("ca_mkd", {}),
        ("dkd", {}),
        ("fitnet", {"method_options": {"student_layers": "1", "teacher_layers": "1"}}),
    ],
)
@pytest.mark.usefixtures("pages")
def test_batches_of_tensors_train_by_every_method_with_records_and_report(
    tmp_path, method, options
):
    mentors = {"wide": perceptron(32), "narrow": perceptron(8, 1)}
    student, out = perceptron(6), tmp_path / "run"
    before = values_of(student)
    trained, summary = distill(
        student, mentors, train(), test_(), epochs=2, out=out, method=method, **options, **SETTINGS
    )
    assert same(values_of(student), before)
    assert not same(values_of(trained), before)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert summary["results"][-1]["top1"] == records[-1]["test_top1"]
    with torch.no_grad():
        hits = [(trained(inputs).argmax(1) == classes) for inputs, classes in test_()]
    assert torch.cat(hits).float().mean().item() == pytest.approx(records[-1]["test_top1"])
    assert summary["data"]["train_images"] == 90
    assert (out / "report.html").stat().st_size > 10_000
    if method == "classroom":
        assert list(records[-1]["mentors"]) == ["wide", "narrow"]


def test_alone_a_loader_trains_as_a_plain_loop_does():
    """The batches as they come: those that torch's own loop would get with the same seed."""
    seeds: list[int] = []
    original = torch.manual_seed

    def noted(seed):
        seeds.append(seed)
        return original(seed)

    student = perceptron(6)
    settings = {"batch_size": 16, "learning_rate": 0.1, "schedule": "steps", "momentum": 0.0}
    settings |= {"weight_decay": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", noted)
        options = {**SETTINGS, "training": settings}
        trained, _ = distill(student, [], train(), test_(), epochs=1, method="alone", **options)
    own = copy.deepcopy(student)
    original(seeds[-1])
    for inputs, classes in train():
        nn.functional.cross_entropy(own(inputs), classes).backward()
        with torch.no_grad():
            for parameter in own.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    for ours, theirs in zip(trained.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_resumes_at_an_epoch_with_the_same_bits(tmp_path, monkeypatch):
    """Interrupted in the middle of the third epoch; the dropout and the order too."""
    mentors = {"wide": perceptron(32)}
    arguments = (perceptron(6), mentors, train(), test_())
    whole, summary = distill(*arguments, epochs=4, **SETTINGS)
    original = Trainer._step

    def stopping(self, *batch):
        original(self, *batch)
        if (self.epoch, self.batch) == (3, 2):
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(KeyboardInterrupt) as caught:
        distill(*arguments, epochs=4, out=out, **SETTINGS)
    assert f"distill(…, out={str(out)!r}, resume=True) continues" in str(caught.value)
    monkeypatch.setattr(Trainer, "_step", original)
    assert "was started with seed 3, which is 4 now" in refusal(
        *arguments, **{**SETTINGS, "epochs": 4, "out": out, "resume": True, "seed": 4}
    )
    other = {"wide": perceptron(32, 5)}
    assert "the module wide changed since" in refusal(
        arguments[0], other, *arguments[2:], **{**SETTINGS, "epochs": 4, "out": out, "resume": True}
    )
    resumed, again = distill(*arguments, epochs=4, out=out, resume=True, **SETTINGS)
    assert same(values_of(whole), values_of(resumed))
    assert summary["results"] == again["results"]
    done, once_more = distill(*arguments, epochs=4, out=out, resume=True, **SETTINGS)
    assert same(values_of(whole), values_of(done))
    assert once_more["results"] == again["results"]


def test_the_command_line_says_that_such_a_run_is_pythons(tmp_path, capsys):
    out = tmp_path / "run"
    distill(perceptron(6), [], train(), test_(), epochs=1, method="alone", out=out, **SETTINGS)
    assert cli.main(["report", str(out)]) == 0
    assert cli.main(["evaluate", str(out), "--data", "digits"]) == 2
    assert "unknown network, 'Sequential': if it is a module of your own" in capsys.readouterr().err
    (out / "summary.json").unlink()
    assert cli.main(["train", "--resume", str(out)]) == 2
    assert "was started in Python: classroomkd.distill(" in capsys.readouterr().err


def test_data_sets_become_image_sets_and_are_split(tmp_path):
    images = colours(60)
    pairs = [(images.images[i], int(images.targets[i])) for i in range(60)]
    options = {**SETTINGS, "data": {"validation": 0.0, "test_share": 0.25}}
    _, summary = distill("resnet8", [], pairs, epochs=1, method="alone", **options)
    assert (summary["data"]["train_images"], summary["data"]["test_images"]) == (45, 15)
    assert summary["data"]["class_names"] == ["0", "1", "2"]
    floats = [(image.astype(np.float32), target) for image, target in pairs]
    message = refusal("resnet8", [], floats, method="alone")
    assert "train: sample 0 of the data set cannot be used: its image is float32" in message
    assert "or give a DataLoader of it" in message


def test_a_mentors_mapping_is_a_recipes(tmp_path):
    """Its normalisation, training from the given weights, and names as on the command line."""
    torch.manual_seed(1)
    given = create("resnet8", 3)
    mentors = {
        "as_it_is": {"source": given, "mean": [0.1] * 3, "std": [0.5] * 3},
        "trained": {"source": given, "epochs": 1},
        "named": "resnet8",
    }
    _, summary = distill(
        "resnet8", mentors, colours(40), colours(13, 1), epochs=1, out=tmp_path / "run", **SETTINGS
    )
    names = [(result["name"], result["epochs"]) for result in summary["results"]]
    assert names == [("as_it_is", None), ("trained", 1), ("resnet8", 1), ("resnet8", 1)]


@pytest.mark.parametrize("mentors", [[perceptron(8), perceptron(9)], perceptron(8)])
def test_mentors_without_names_are_called_by_their_class(mentors):
    """Which is the student's too, and whose objects cannot be counted."""
    _, summary = distill(perceptron(6), mentors, train(), test_(), epochs=1, **SETTINGS)
    names = [result["name"] for result in summary["results"] if result["phase"] == "mentor"]
    assert names == ["Sequential-2", "Sequential-3"][: 2 if isinstance(mentors, list) else 1]


class Stream(torch.utils.data.IterableDataset):
    """Of no length."""

    def __iter__(self):
        yield torch.zeros(12), 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": 3}, "the student must be a torch.nn.Module or a name, not int"),
        ({"mentors": []}, "method classroom needs mentors: give some, or method='alone'"),
        (
            {"student": nn.Linear(12, 5), "train": named(train())},
            "the student Linear has 5 outputs for 4",
        ),
        ({"student": nn.Linear(7, 4)}, "the student Linear cannot take a batch [2, 12]"),
        ({"student": nn.LSTM(12, 4)}, "the student LSTM returns a tuple, not logits"),
        (
            {"mentors": {"m": nn.Linear(12, 5)}},
            "the student Sequential has 4 outputs, mentor m has 5",
        ),
        ({"mentors": {"m": 3}}, "the mentor m must be a torch.nn.Module, a name or a mapping"),
        ({"mentors": {"a/b": nn.Linear(12, 4)}}, "a mentor's name is of letters"),
        ({"mentors": ["nets.py:no"]}, "nets.py, which "),
        ({"test": None}, "test is missing: the batches of a DataLoader cannot be split"),
        ({"test": colours(9)}, "train is a DataLoader and test is not: give either for all"),
        ({"train": DataLoader(Stream())}, "train has no length, which schedules need"),
        ({"train": DataLoader(torch.zeros(8, 12))}, "train must give (images, targets)"),
        (
            {"train": DataLoader(TensorDataset(torch.zeros(8, 12), torch.ones(8, 1).long()))},
            "train gives targets [1, 1] of torch.int64 for 1 images: they must be class indices",
        ),
        (
            {"train": DataLoader(TensorDataset(torch.zeros(8, 12), torch.arange(8)), 8)},
            "train gives the target 4: class indices are from 0 to 3, as there are 4 classes",
        ),
        (
            {"test": DataLoader(TensorDataset(torch.zeros(8, 12), -torch.arange(8)), 8)},
            "test gives the target -1: class indices are from 0 to 3",
        ),
        (
            {"test": DataLoader(TensorDataset(torch.zeros(8, 12), torch.eye(8)[:, :4]), 8)},
            "test gives class probabilities: give class indices [B]",
        ),
        ({"train": "photos/", "test": None}, "train must be data, not the path photos/: read it"),
        ({"training": {"mixup": 0.2}}, "training.mixup mixes known samples"),
        ({"data": {"flip": True}}, "data: flip has no meaning for the batches of a DataLoader"),
        ({"training": {"epoch": 3}}, "there is no key training.epoch: did you mean"),
        ({"trainin": {"epochs": 3}}, "there is no key trainin: did you mean training?"),
        ({"mentor_trainin": {}}, "there is no key mentor_trainin: did you mean mentor_training?"),
        ({"method": "kdd"}, "no method is called 'kdd'"),
        ({"loss": {"temperature": 0}}, "loss: temperature must be greater than 0"),
    ],
)
def test_what_cannot_be_used_gets_one_line(change, message):
    arguments = {"student": perceptron(6), "mentors": {"m": perceptron(8)}, "train": train()}
    arguments = {**arguments, "test": test_(), **SETTINGS, **change}
    arguments["training"] = {"batch_size": 16, **change.get("training", {})}
    first = [arguments.pop(name) for name in ("student", "mentors", "train")]
    found = refusal(*first, **arguments)
    assert message in found
