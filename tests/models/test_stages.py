"""The stage features of every network of the zoo."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from classroomkd.errors import UserError
from classroomkd.models import create, names
from classroomkd.models.stages import StageOutputs, stages
from classroomkd.training.fold import fold_batch_norms
from classroomkd.training.mentor_bank import MentorBank
from zoo_weights import fill, probe

# Channels and side of the features of each stage, for images of 32×32: He et al. (2015), section
# 4.2 and table 1; Zagoruyko and Komodakis (2016), table 1; Sandler et al. (2018), table 2, halved;
# the rest by the widths that these networks are known by.
RESNET = [(16, 32), (32, 16), (64, 8)]
WIDE = [(64, 32), (128, 16), (256, 8)]
VGG = [(128, 16), (256, 8), (512, 4), (512, 4)]


def widened(factor: int) -> list[tuple[int, int]]:
    return [(channels * factor, side) for channels, side in RESNET]


SHAPES = {
    **{f"resnet{depth}": RESNET for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}_a": RESNET for depth in (20, 32, 44, 56, 110)},
    "resnet8x4": WIDE,
    "resnet32x4": WIDE,
    "resnet18": [(64, 32), (128, 16), (256, 8), (512, 4)],
    "resnet34": [(64, 32), (128, 16), (256, 8), (512, 4)],
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn_16_1": widened(1),
    "wrn_16_2": widened(2),
    "wrn_16_8": widened(8),
    "wrn_28_10": widened(10),
    "wrn_40_1": widened(1),
    "wrn_40_2": widened(2),
    **{f"vgg{depth}": VGG for depth in (8, 11, 13, 16, 19)},
    "mobilenetv2": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(116, 16), (232, 8), (464, 4)],
}


@pytest.mark.parametrize("name", names())
def test_shapes_of_every_network(name: str) -> None:
    with torch.device("meta"):
        network = create(name, 10)
        outputs = StageOutputs(network)
        network(torch.empty(2, 3, 32, 32))
    expected = [(2, channels, side, side) for channels, side in SHAPES[name]]
    assert [tuple(features.shape) for features in outputs.take()] == expected


# What each network does with its last features, written out.
HEADS = {
    "resnet8": lambda n, f: n.fc(f.mean((2, 3))),
    "resnet34": lambda n, f: n.linear(f.mean((2, 3))),
    "wrn_16_1": lambda n, f: n.fc(n.bn1(f).relu().mean((2, 3))),
    "vgg8": lambda n, f: n.classifier(f.mean((2, 3))),
    "mobilenetv2": lambda n, f: n.classifier(n.conv2(f).mean((2, 3))),
    "shufflenetv1": lambda n, f: n.linear(f.mean((2, 3))),
    "shufflenetv2": lambda n, f: n.linear(n.bn2(n.conv2(f)).relu().mean((2, 3))),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_last_features_decide_the_logits(name: str) -> None:
    network = fill(create(name, 100)).eval()
    outputs = StageOutputs(network)
    with torch.no_grad():
        logits = network(probe())
        torch.testing.assert_close(HEADS[name](network, outputs.take()[-1]), logits)


@pytest.mark.parametrize("name", HEADS)
def test_a_folded_copy_in_inference_mode_has_the_same_features(name: str) -> None:
    network = fill(create(name, 100)).eval()
    folded = fold_batch_norms(network)
    ours, theirs = StageOutputs(network), StageOutputs(folded)
    with torch.inference_mode():
        network(probe())
        folded(probe())
    for expected, actual in zip(ours.take(), theirs.take(), strict=True):
        assert actual.is_inference()
        assert float((actual - expected).norm() / expected.norm()) < 1e-5


def test_gradients_flow_through_the_features() -> None:
    network = create("resnet8", 10)
    outputs = StageOutputs(network)
    network(probe())
    outputs.take()[1].square().sum().backward()
    assert network.layer2[0].conv1.weight.grad.norm() > 0
    assert network.layer1[0].conv1.weight.grad.norm() > 0
    assert network.layer3[0].conv1.weight.grad is None


def test_the_last_call_counts_once() -> None:
    network = create("resnet8", 10).eval()
    outputs = StageOutputs(network)
    network(torch.zeros(1, 3, 16, 16))
    network(torch.zeros(3, 3, 8, 8))
    shapes = [tuple(features.shape) for features in outputs.take()]
    assert shapes == [(3, 16, 8, 8), (3, 32, 4, 4), (3, 64, 2, 2)]
    with pytest.raises(UserError, match=r"^layer layer1 was not called in the forward pass"):
        outputs.take()


def test_a_network_within_another_module() -> None:
    network = create("vgg8", 10)
    wrapped = nn.Sequential(nn.Identity(), network)
    assert stages(network)[0] == "block1"
    for theirs, own in zip(stages(wrapped), stages(network), strict=True):
        assert wrapped.get_submodule(theirs) is network.get_submodule(own)


def test_another_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"^the stages of a Sequential are not known: name its"):
        StageOutputs(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


def tokens() -> nn.Module:
    """A network whose layers give a map, tokens, a vector, a tuple, and are not all called."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 4, stride=4)
            self.mixed = nn.Linear(6, 6)
            self.pair = nn.LSTM(6, 5, batch_first=True)
            self.head = nn.Linear(5, 2)
            self.idle = nn.Linear(2, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            mixed = self.mixed(self.patches(images).flatten(2).transpose(1, 2)).relu()
            return self.head(self.pair(mixed)[0].mean(1))

    torch.manual_seed(0)
    return Tokens()


def test_layers_of_any_network_by_their_paths() -> None:
    network, images = tokens().eval(), torch.randn(2, 3, 8, 8)

    def features_of(layer: str) -> None:
        taken = StageOutputs(network, [layer])
        network(images)
        taken.take()

    outputs = StageOutputs(network, ["patches", "mixed", "head"])
    logits = network(images)
    maps, mixed, head = outputs.take()
    expected = network.patches(images)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(
        mixed[..., 0], network.mixed(expected.flatten(2).transpose(1, 2)).transpose(1, 2)
    )
    assert torch.equal(head[:, :, 0, 0], logits)
    for layer, message in (
        ("mixd", "a Tokens has no layer 'mixd'; the nearest are mixed"),
        ("", "a Tokens has no layer ''"),
        ("pair", "layer pair gives tuple, and features are"),
        ("idle", "layer idle was not called in the forward pass: name another"),
    ):
        with pytest.raises(UserError) as caught:
            features_of(layer)
        assert message in str(caught.value)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_give_the_same_features_and_gradients() -> None:
    """The student's with their graph, a mentor's in inference mode."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Tanh()]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))

    images, found = torch.randn(4, 3, 8, 8), []
    for compile in (False, True):
        student, layers = network(), ["2", "4"]
        outputs = StageOutputs(student, layers)
        for _ in range(2):  # the second call finds compiled code
            # Inductor has the mentor's below.
            logits = (torch.compile(student, backend="aot_eager") if compile else student)(images)
            features = outputs.take()
        (logits.sum() + sum(f.square().sum() for f in features)).backward()
        found.append([*features, *(parameter.grad for parameter in student.parameters())])
        bank = MentorBank(
            {"m": network()}, 3, device="cpu", compile=compile, features=True, layers=layers
        )
        bank(images)
        (mentor,) = bank(images)
        found[-1] += [mentor.logits.clone(), *(feature.clone() for feature in mentor.features)]
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
