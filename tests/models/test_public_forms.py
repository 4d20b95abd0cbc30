"""Checkpoints in the forms of public repositories give the logits that their own networks give.

The networks here are written from the descriptions of those forms: nothing of the zoo is in them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classroomkd.cli import main
from classroomkd.models import create, external, load_network, recognition
from classroomkd.runs.mentor_setup import find_mentors, is_checkpoint, sha256_of
from classroomkd.runs.recipe import MentorConfig
from classroomkd.torchvision import import_torchvision
from classroomkd.training.config import TrainingConfig
from classroomkd.training.schedule import peak_learning_rate
from zoo_weights import fill, probe, without_weights

torchvision_models = import_torchvision("models")
with_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm")
EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_module.py"


class OptionA(nn.Module):
    """A block whose shortcut drops pixels and adds channels of zeros, a quarter on each side."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.widens = before != after

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.widens:
            x = x[:, :, ::2, ::2]
            zeros = torch.zeros_like(x[:, : x.shape[1] // 2])
            x = torch.cat([zeros, x, zeros], 1)
        return torch.relu(out + x)


class Projected(nn.Module):
    """A block whose shortcut is called as the form wants it."""

    def __init__(self, before: int, after: int, stride: int, called: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        way = nn.Sequential()
        if stride != 1 or before != after:
            way = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        self.called = called
        setattr(self, called, way)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + getattr(self, self.called)(x))


class Residual(nn.Module):
    """A block whose convolutions are one sequence."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual_function(x) + self.shortcut(x))


def stage(block, count: int, before: int, after: int, stride: int, *more: str) -> nn.Sequential:
    first = block(before, after, stride, *more)
    return nn.Sequential(first, *(block(after, after, 1, *more) for _ in range(count - 1)))


class ThreeStages(nn.Module):
    def __init__(self, block, depth: int, head: str, *more: str) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = stage(block, count, 16, 16, 1, *more)
        self.layer2 = stage(block, count, 16, 32, 2, *more)
        self.layer3 = stage(block, count, 32, 64, 2, *more)
        self.head = head
        setattr(self, head, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return getattr(self, self.head)(F.avg_pool2d(x, x.shape[3]).flatten(1))


class ResNet18(nn.Module):
    def __init__(self, head: str, called: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        self.layer1 = stage(Projected, 2, 64, 64, 1, called)
        self.layer2 = stage(Projected, 2, 64, 128, 2, called)
        self.layer3 = stage(Projected, 2, 128, 256, 2, called)
        self.layer4 = stage(Projected, 2, 256, 512, 2, called)
        self.head = head
        setattr(self, head, nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        x = F.avg_pool2d(self.layer4(self.layer3(x)), 4).flatten(1)
        return getattr(self, self.head)(x)


class NumberedResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        )
        self.conv2_x = stage(Residual, 2, 64, 64, 1)
        self.conv3_x = stage(Residual, 2, 64, 128, 2)
        self.conv4_x = stage(Residual, 2, 128, 256, 2)
        self.conv5_x = stage(Residual, 2, 256, 512, 2)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def assert_same_logits(path: Path, source: nn.Module, images: Tensor, name: str) -> list[str]:
    """Load ``path`` as ``name`` and compare; what was told."""
    told: list[str] = []
    network, info, architecture = load_network(path, notify=told.append)
    assert (info, architecture) == (None, name)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), source(images), rtol=1e-6, atol=1e-6)
    return told


@pytest.mark.parametrize(
    ("depth", "head"),
    [*((d, "linear") for d in (20, 32, 44, 56, 110)), (20, "fc"), (20, "classifier")],
)
def test_shortcuts_without_parameters(tmp_path: Path, depth: int, head: str) -> None:
    source = fill(ThreeStages(OptionA, depth, head)).eval()
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "best.th")
    told = assert_same_logits(tmp_path / "best.th", source, probe(), f"resnet{depth}_a")
    path = tmp_path / "best.th"
    renamed = ", ".join(f"{head}.{kind} for fc.{kind}" for kind in ("weight", "bias"))
    assert told == ([] if head == "fc" else [f"{path}: renamed: {renamed}"])


@pytest.mark.parametrize("called", ["shortcut", "downsample"])
def test_projections_by_either_name(tmp_path: Path, called: str) -> None:
    source = fill(ThreeStages(Projected, 20, "linear", called)).eval()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert_same_logits(tmp_path / "a.pth", source, probe(), "resnet20")


@pytest.mark.parametrize(
    ("head", "called"), [("linear", "shortcut"), ("fc", "downsample"), ("classifier", "shortcut")]
)
def test_resnet18_for_cifar(tmp_path: Path, head: str, called: str) -> None:
    source = fill(ResNet18(head, called)).eval()
    torch.save({"net": source.state_dict(), "acc": 95.4, "epoch": 199}, tmp_path / "ckpt.pth")
    assert_same_logits(tmp_path / "ckpt.pth", source, probe(), "resnet18")


def test_resnet18_with_numbered_stages(tmp_path: Path) -> None:
    source = fill(NumberedResNet18()).eval()
    torch.save(source.state_dict(), tmp_path / "resnet18-200-best.pth")
    assert_same_logits(tmp_path / "resnet18-200-best.pth", source, probe(), "resnet18")


def replaced(network: nn.Module, name: str, head: nn.Module) -> nn.Module:
    network.set_submodule(name, head)
    return network


FINE_TUNED = {
    "resnet18": lambda n: replaced(n, "fc", nn.Linear(512, 7)),
    "mobilenet_v2": lambda n: replaced(n, "classifier", nn.Linear(1280, 7)),
    "efficientnet_b0": lambda n: replaced(n, "classifier.1", nn.Linear(1280, 7)),
    "densenet121": lambda n: replaced(
        n, "classifier", nn.Sequential(nn.Dropout(), nn.Linear(1024, 7))
    ),
    "vit_b_16": lambda n: replaced(n, "heads", nn.Linear(768, 7)),
}


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuned_networks_of_torchvision(tmp_path: Path, name: str) -> None:
    source = FINE_TUNED[name](torchvision_models.get_model(name)).eval()
    state = {f"model.{n}": tensor for n, tensor in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "best.ckpt")
    images = torch.randn(1, 3, 224, 224)
    told = assert_same_logits(tmp_path / "best.ckpt", source, images, f"tv:{name}")
    assert f"recognised as tv:{name} by its names and shapes" in told[0]


@with_timm
@pytest.mark.parametrize(
    ("name", "alike"), [("mobilenetv1_100", ""), ("resnet26d", ""), ("resnet34d", "resnetaa34d")]
)
def test_fine_tuned_networks_of_timm(tmp_path: Path, name: str, alike: str) -> None:
    import timm

    source = timm.create_model(name, num_classes=7).eval()
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    images = torch.randn(1, 3, 64, 64)
    (told,) = assert_same_logits(tmp_path / "last.pth.tar", source, images, f"timm:{name}")
    assert (f"timm:{alike} would fit too" in told) == bool(alike)


@with_timm
def test_a_name_in_the_file_decides_between_networks_of_one_shape(tmp_path: Path) -> None:
    import timm

    source = timm.create_model("resnetblur18", num_classes=7).eval()
    path = tmp_path / "last.pth.tar"
    torch.save({"arch": "resnetblur18", "state_dict": source.state_dict()}, path)
    assert_same_logits(path, source, torch.randn(1, 3, 64, 64), "timm:resnetblur18")


def test_a_network_that_is_nearly_torchvisions_is_compared_with_it(tmp_path: Path) -> None:
    network = torchvision_models.resnet18(num_classes=7)
    network.conv1 = nn.Conv2d(4, 64, 7, bias=False)
    torch.save(network.state_dict(), tmp_path / "depth.pth")
    with pytest.raises(
        ValueError, match=r"nearest, tv:resnet18, differs: with another shape: conv1"
    ):
        load_network(tmp_path / "depth.pth")


def test_an_altered_classifier_is_all_that_differs(tmp_path: Path) -> None:
    """Not the names that would differ if a part of the file were taken for the whole."""
    network = torchvision_models.mobilenet_v3_small()
    network.classifier = nn.Sequential(nn.Linear(576, 32), nn.ReLU(), nn.Linear(32, 3))
    torch.save(network.state_dict(), tmp_path / "altered.pth")
    with pytest.raises(ValueError, match="does not fit") as raised:
        load_network(tmp_path / "altered.pth", architecture="tv:mobilenet_v3_small")
    message = str(raised.value)
    assert "features." not in message
    assert "missing: classifier.3.weight [classes, 1024], classifier.3.bias [classes];" in message
    assert message.endswith("give what makes the altered one, FILE.py:NAME)")


@with_timm
def test_a_network_that_is_nearly_timms_is_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once to find it and once more for the nearest, and only where it may be."""
    import timm

    network = timm.create_model("resnet18", num_classes=7)
    network.conv1 = nn.Conv2d(4, 64, 7, bias=False)
    torch.save({"model": network.state_dict()}, tmp_path / "depth.pth")
    built: Counter[str] = Counter()
    build = external.build
    monkeypatch.setattr(external, "build", lambda name, n: built.update([name]) or build(name, n))
    recognition._cached_shapes.cache_clear()
    recognition._near.cache_clear()
    with pytest.raises(ValueError, match=r"nearest, (tv|timm):resnet18, differs in model: with an"):
        load_network(tmp_path / "depth.pth")
    assert {"tv:resnet18", "timm:resnet18"} <= built.keys()
    assert set(built.values()) == {1}
    assert len(built) < len(timm.list_models()) / 4


@pytest.mark.parametrize("head", ["head", "fc", "classifier.0"])
@pytest.mark.parametrize("before", ["", "model."])
@pytest.mark.parametrize("name", ["resnet8", "tv:resnet18"])
def test_a_classifier_beside_a_backbone(tmp_path: Path, head: str, before: str, name: str) -> None:
    source = fill(create(name, 7)).eval()
    state = {
        f"{before}{head}.{key.removeprefix('fc.')}"
        if key.startswith("fc.")
        else f"{before}backbone.{key}": tensor
        for key, tensor in source.state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    told = assert_same_logits(tmp_path / "last.ckpt", source, torch.randn(1, 3, 64, 64), name)
    assert "left out" not in " ".join(told)


def test_a_network_with_something_small_beside_it_is_read_as_before(tmp_path: Path) -> None:
    source = fill(create("resnet8", 7)).eval()
    state = {f"backbone.{key}": tensor for key, tensor in source.state_dict().items()}
    torch.save(state | {"projector.weight": torch.zeros(8, 64)}, tmp_path / "last.pth")
    (told,) = assert_same_logits(tmp_path / "last.pth", source, probe(), "resnet8")
    assert "left out: projector.weight" in told


@pytest.mark.filterwarnings("ignore")  # classes that a process without Lightning cannot name
def test_what_the_example_for_lightning_saves(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    example = runpy.run_path(str(EXAMPLE), run_name="example")
    student, mentor = fill(create("resnet8", 10)), create("resnet14", 10)
    images = torch.utils.data.TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8))
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        example["Classroom"](student, [mentor]), torch.utils.data.DataLoader(images, batch_size=4)
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert_same_logits(tmp_path / "last.ckpt", student.eval(), probe(), "resnet8")


def test_an_entry_is_taken_wherever_a_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "both.ckpt"
    states = {"ema": create("resnet14", 10).state_dict(), "net": create("resnet8", 10).state_dict()}
    torch.save(states, path)
    source = f"{path}:ema"
    assert is_checkpoint(source)
    assert is_checkpoint("missing.ckpt")
    assert is_checkpoint("missing.pth.tar:net")
    assert sha256_of(source) == hashlib.sha256(path.read_bytes()).hexdigest()
    told: list[str] = []
    mentors = find_mentors([MentorConfig(str(path)), MentorConfig(source)], 1, told.append)
    assert [mentor.name for mentor in mentors] == ["resnet8", "resnet14"]
    assert told == [f"{path}: used net, not ema (to select it: {path}:ema)"]

    for entry, architecture in (("", "resnet8"), (":ema", "resnet14")):
        assert main(["evaluate", f"{path}{entry}", "--data", "digits"]) == 0
        printed = capsys.readouterr().out
        assert f"\n{architecture} of {path}{entry} on the held-out part" in printed
        assert printed.startswith(f"{path}: used net, not ema") == (not entry)
    assert main(["evaluate", f"{tmp_path / 'missing.ckpt'}:ema", "--data", "digits"]) == 2
    error = capsys.readouterr().err
    assert error == f"classroomkd: error: there is no checkpoint {tmp_path / 'missing.ckpt'}\n"


def test_the_usual_learning_rate_hangs_on_the_network_and_not_on_its_name() -> None:
    usual = TrainingConfig(learning_rate=None)
    for name in ("mobilenetv2", "shufflenetv1", "shufflenetv2", "tv:mobilenet_v2"):
        assert peak_learning_rate(usual, without_weights(name)) == 0.01
    for name in ("resnet20", "resnet20_a", "resnet18", "vgg8", "wrn_16_1", "tv:resnext50_32x4d"):
        assert peak_learning_rate(usual, without_weights(name)) == 0.05
    given = TrainingConfig(learning_rate=0.1)
    assert peak_learning_rate(given, without_weights("mobilenetv2")) == 0.1
