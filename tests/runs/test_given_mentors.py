"""Given mentors are looked at before a run trains, and while it does."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from classroomkd.cli import main
from classroomkd.errors import UserError
from classroomkd.models import NetworkInfo, create, save_network
from classroomkd.runs.networks import NetworkTrainer
from classroomkd.runs.training_run import TrainingRun
from small_runs import CLASSES, colours, recipe


@pytest.fixture(scope="module")
def knowing():
    """A network that tells the colours of `colours` apart."""
    torch.manual_seed(0)
    network = create("resnet8", 3)
    images = colours(240, seed=5)
    pixels = (torch.from_numpy(images.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    targets = torch.from_numpy(images.targets)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for _ in range(25):
        nn.functional.cross_entropy(network(pixels), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


def kept(network, path, order=(0, 1, 2)):
    """Write it with its classes in another order."""
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    for name in list(weights)[-2:]:  # the classifier's
        weights[name] = weights[name][list(order)]
    other = create("resnet8", 3)
    other.load_state_dict(weights)
    save_network(path, other, NetworkInfo("resnet8", CLASSES, (0.5,) * 3, (0.25,) * 3, 8))
    return str(path)


def run_with(mentors, out, *overrides):
    text = io.StringIO()
    given = f"mentors=[{', '.join(mentors)}]"
    run = TrainingRun(
        recipe(given, "training.epochs=1", "alone=false", *overrides), Console(file=text, width=300)
    )
    run.run(colours(60), colours(200, 1), out)
    return text.getvalue()


def test_a_run_names_the_fault(tmp_path, knowing):
    mentors = [
        kept(knowing, tmp_path / "fine.safetensors"),
        kept(knowing, tmp_path / "turned.safetensors", (1, 2, 0)),
    ]
    fine, turned = (
        line
        for line in run_with(mentors, tmp_path / "run").splitlines()
        if line.startswith("mentor resnet8") and "top-1" in line
    )
    assert f"({mentors[0]}): top-1" in fine
    assert ";" not in fine
    assert "its classes are in another order" in turned
    assert "red is its output 2 instead of 0" in turned


def test_few_validation_images_give_way_to_more_held_out_ones(tmp_path, knowing):
    mentors = [kept(knowing, tmp_path / "fine.safetensors")]
    printed = run_with(mentors, tmp_path / "run", "data.validation=0.1", "strict=true")
    (line,) = (
        line for line in printed.splitlines() if "top-1" in line and "mentor resnet8 (" in line
    )
    assert line.endswith("of 200 images")


def test_a_strict_run_stops(tmp_path, knowing):
    mentors = [kept(knowing, tmp_path / "turned.safetensors", (1, 2, 0))]
    with pytest.raises(UserError, match="strict=true is set"):
        run_with(mentors, tmp_path / "run", "strict=true")
    assert not (tmp_path / "run").exists()


def test_the_command(tmp_path, knowing, capsys):
    """Digits: mentors by name have no weights yet; a faulty file gives status 1 with --strict."""
    torch.manual_seed(0)
    info = NetworkInfo("resnet8", [str(c) for c in range(10)], (0.3,) * 3, (0.4,) * 3, 8)
    save_network(tmp_path / "untrained.safetensors", create("resnet8", 10), info)
    command = ["check", "--data", "digits", "--image-size", "8", "--mentors"]
    command += [str(tmp_path / "untrained.safetensors"), "resnet14"]
    assert not main(command)
    printed = capsys.readouterr().out
    assert "resnet14: has no weights yet" in printed
    assert all(printed.splitlines())
    assert f"resnet8 ({tmp_path / 'untrained.safetensors'}): top-1" in printed
    assert "near chance" in printed
    assert main([*command, "--strict"]) == 1
    capsys.readouterr()
    assert not main(["check", "--data", "digits", "--image-size", "8", "--mentors", "resnet14"])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_mentor_that_teaches_nothing_is_named_once():
    told = []
    trainer = NetworkTrainer.__new__(NetworkTrainer)
    trainer.notify = told.append

    def record(epoch, **shares):
        return {"epoch": epoch, "mentors": {n: {"active_share": s} for n, s in shares.items()}}

    records = [record(1, a=0.5, b=0.0005), record(2, a=0.0, b=0.0), record(3, a=0.0, b=0.2)]
    for index, of in enumerate(records):
        trainer._warn_silent(of, records[:index])
    assert [line.split(":")[0] + line.split("mentor ")[1][0] for line in told] == [
        "epoch 1b",
        "epoch 2a",
    ]
    trainer._warn_silent({"epoch": 4}, records)  # alone
    assert len(told) == 2
