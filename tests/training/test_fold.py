"""Folding batch norms: the same function, with as few norms as the data flow allows."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classroomkd.models import NetworkInfo, create, names
from classroomkd.models.layout import Renormalised
from classroomkd.torchvision import import_torchvision
from classroomkd.training.fold import fold_batch_norms, foldable
from zoo_weights import fill, probe, relative_error

# Batch norms folded, of how many. Before its first convolution, after its sums and at its end a
# pre-activation network has norms that follow none, and the norm after the stem's convolution of
# a wide network is one of two consumers unless a shortcut's convolution takes its place.
FOLDED = {
    **{f"resnet{depth}": (depth + 1, depth + 1) for depth in (14, 20, 32, 44, 56, 110)},
    "resnet8": (9, 9),
    "resnet8x4": (10, 10),
    "resnet32x4": (34, 34),
    **{f"resnet{depth}_a": (depth - 1, depth - 1) for depth in (20, 32, 44, 56, 110)},
    "resnet18": (20, 20),
    "resnet34": (36, 36),
    "resnet50": (53, 53),
    "wrn_16_1": (6, 13),
    "wrn_16_2": (7, 13),
    "wrn_16_8": (7, 13),
    "wrn_28_10": (13, 25),
    "wrn_40_1": (18, 37),
    "wrn_40_2": (19, 37),
    "vgg8": (5, 5),
    "vgg11": (8, 8),
    "vgg13": (10, 10),
    "vgg16": (13, 13),
    "vgg19": (16, 16),
    "mobilenetv2": (53, 53),
    "shufflenetv1": (49, 49),
    "shufflenetv2": (56, 56),
}
IMAGES = probe()[:1, :, :16, :16]


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@torch.no_grad()
def check_same(network: nn.Module, images: Tensor, folded_norms: int) -> nn.Module:
    """Fold ``network``, which must stay as it is, and compare the two; returns the folded one."""
    network.train()
    state = copy.deepcopy(network.state_dict())
    single = fold_batch_norms(network)
    assert norms(network) - norms(single) == len(foldable(network)) == folded_norms
    assert all(module.training for module in network.modules())
    assert not any(module.training for module in single.modules())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    storages = {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert not storages & {tensor.data_ptr() for tensor in single.state_dict().values()}
    assert {tensor.dtype for tensor in single.parameters()} == {torch.float32}

    network.eval()
    assert relative_error(single(images), network(images)) < 2e-6
    precise, images = copy.deepcopy(network).double(), images.double()
    assert relative_error(fold_batch_norms(precise)(images), precise(images)) < 1e-13
    return single


@pytest.mark.parametrize("name", names())
def test_every_network_of_the_zoo(name: str) -> None:
    with torch.device("meta"):
        network = create(name)
    assert (len(foldable(network)), norms(network)) == FOLDED[name]


# One of each kind of block and of data flow; the others have more of the same, or wider ones.
KINDS = ("resnet8", "resnet20_a", "resnet18", "resnet50", "wrn_16_1", "wrn_16_2")
KINDS += ("vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_network_is_the_same_folded(name: str) -> None:
    check_same(fill(create(name)), IMAGES, FOLDED[name][0])


@pytest.mark.parametrize(
    ("name", "folded_norms", "all_norms"),
    [("resnet18", 20, 20), ("mobilenet_v2", 52, 52), ("densenet121", 59, 121)],
)
def test_networks_of_torchvision(name: str, folded_norms: int, all_norms: int) -> None:
    network = fill(import_torchvision("models").get_model(name, num_classes=10))
    assert norms(network) == all_norms
    check_same(network, probe()[:1], folded_norms)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm")
@pytest.mark.parametrize(
    ("name", "all_norms"), [("mobilenetv1_100", 27), ("tf_mobilenetv3_large_minimal_100", 46)]
)
def test_networks_of_timm(name: str, all_norms: int) -> None:
    network = fill(create(f"timm:{name}", 10))  # whose norms have an activation
    assert norms(network) == all_norms
    check_same(network, probe(), all_norms)


def test_a_mentor_for_other_normalisation_statistics() -> None:
    data = NetworkInfo("", [], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16)
    own = NetworkInfo("", [], (0.3, 0.4, 0.5), (0.4, 0.2, 0.3), 16)
    check_same(Renormalised(fill(create("resnet8")), data, own), IMAGES, 9)


def test_weights_are_combined_in_float64() -> None:
    network = fill(nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64)))
    conv, norm = copy.deepcopy(network).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = fold_batch_norms(network)[0]
    weight = conv.weight * scale[:, None, None, None]
    # Where float64 is near the middle of two float32 numbers, another order of operations may tip.
    assert (folded.weight == weight.float()).float().mean() > 0.999
    assert (folded.bias == (norm.bias - norm.running_mean * scale).float()).float().mean() > 0.98
    in_float32 = network[0].weight * scale.float()[:, None, None, None]
    assert (in_float32 == weight.float()).float().mean() < 0.9


class Block(nn.Module):
    """A convolution, a norm and another convolution of the same shape, wired by ``forward``."""

    def __init__(self, wiring, conv: nn.Conv2d | None = None, **norm) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3, **norm)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def chain(m: Block, x: Tensor) -> Tensor:
    return m.conv2(F.relu(m.norm(m.conv(x))))


@pytest.mark.parametrize(
    "block",
    [
        Block(chain),
        Block(chain, nn.Conv2d(3, 3, 1, bias=False)),
        Block(chain, nn.Conv2d(3, 3, 3, padding=1, groups=3)),
        Block(chain, nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
        Block(chain, affine=False),
        Block(lambda m, x: m.norm(input=m.conv(x))),
        Block(lambda m, x: (lambda y: y.relu() + y)(m.norm(m.conv(x)))),
        Block(lambda m, x: m.norm(m.conv(m.conv2(m.conv2(x))))),
    ],
)
def test_a_norm_that_follows_a_convolution(block: Block) -> None:
    check_same(fill(block), IMAGES, 1)


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.conv2(m.conv(m.norm(x))),  # before it
        lambda m, x: m.norm(F.relu(m.conv(x))),  # not directly after it
        lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),  # its output is needed
        lambda m, x: m.conv(m.norm(m.conv(x))),  # called again
        lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv2(x)),  # the norm is
        lambda m, x: m.norm(m.conv(x)) + m.conv.weight.mean(),  # a weight is needed
        lambda m, x: m.norm(m.conv(x)) + m.norm.running_var.mean(),
        lambda m, x: m.norm(m.conv(x)) if x.sum() > 0 else m.conv2(x),  # cannot be traced
        lambda m, x: m.norm(m.conv(x) + m.conv2(x)),
    ],
)
def test_a_norm_that_must_stay(wiring) -> None:
    check_same(fill(Block(wiring)), IMAGES, 0)


@torch.no_grad()
def test_a_norm_without_running_statistics_stays() -> None:
    block = fill(Block(chain, track_running_stats=False)).eval()
    assert foldable(block) == {}
    assert torch.equal(fold_batch_norms(block)(IMAGES), block(IMAGES))


def test_convolutions_that_share_a_weight_part() -> None:
    block = fill(Block(chain))
    block.conv2.weight = block.conv.weight
    single = check_same(block, IMAGES, 1)
    assert torch.equal(single.conv2.weight, block.conv.weight)
