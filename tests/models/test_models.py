"""The zoo against the reference zoo's shapes and logits, and what its users rely on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from classroomkd.errors import UserError
from classroomkd.models import create, names
from classroomkd.models.network_names import SIZES, Size
from classroomkd.models.zoo import ZOO
from zoo_weights import fill, probe, relative_error

DATA = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((DATA / "zoo_shapes.json").read_text())
LOGITS = np.load(DATA / "zoo_logits.npz")
# The smallest of each family, and the only one where there is one.
FAMILIES = ["resnet8", "resnet34", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1"]
FAMILIES += ["shufflenetv2"]


# Held against networks in the form of public repositories in test_public_forms.py.
PUBLIC = {"resnet18", *(f"resnet{depth}_a" for depth in (20, 32, 44, 56, 110))}


def test_names_are_the_reference_zoos_and_the_public_ones() -> None:
    assert sorted(SHAPES) == sorted(LOGITS)
    assert sorted(names()) == sorted({*SHAPES, *PUBLIC})


@pytest.mark.slow
def test_sizes_are_those_of_the_networks() -> None:
    """So that listing them takes no torch."""
    sizes = {}
    for name in ZOO:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = create(name).eval()
            model(torch.empty(1, 3, 32, 32))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        sizes[name] = Size(parameters, counter.get_total_flops())
    assert sizes == SIZES
    assert list(sizes) == names()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_names_shapes_and_logits_are_the_reference_zoos(name: str) -> None:
    model = fill(create(name)).eval()
    shapes = {n: list(t.shape) for n, t in model.state_dict().items()}
    counters = {n for n in shapes if n.endswith("num_batches_tracked")}
    assert {n: s for n, s in shapes.items() if n not in counters} == SHAPES[name]
    with torch.inference_mode():
        assert relative_error(model(probe()), torch.from_numpy(LOGITS[name])) < 1e-4


def test_mobilenetv2_does_not_clip_at_6() -> None:
    # The probe batch stays below 6, so its logits cannot tell the reference's ReLU from ReLU6.
    # The scale outlasts what the filled batch norms take away.
    model = fill(create("mobilenetv2")).eval()
    with torch.inference_mode():
        assert model.conv2(model.blocks(model.conv1(1e12 * probe()))).max() > 6


@pytest.mark.parametrize("name", FAMILIES)
def test_other_image_sizes_and_class_counts(name: str) -> None:
    with torch.device("meta"):
        model = create(name, 7).eval()
    for height, width in ((8, 8), (16, 16), (64, 40)):
        assert model(torch.empty(3, 3, height, width, device="meta")).shape == (3, 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last_changes_nothing(name: str) -> None:
    model = fill(create(name)).eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        logits = model(probe().to(memory_format=torch.channels_last))
    assert relative_error(logits, torch.from_numpy(LOGITS[name])) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_training_step_compiles_to_one_graph_and_trains_every_parameter(name: str) -> None:
    model, images = fill(create(name)), probe()[..., :16, :16]
    plain = model(images)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    compiled.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_initialisation_is_he_normal_fan_out(name: str) -> None:
    torch.manual_seed(0)
    model = create(name)
    pooled = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            pooled.append(module.weight.flatten() * (fan_out / 2) ** 0.5)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    standard = torch.cat(pooled)
    assert abs(standard.mean()) < 5 / len(standard) ** 0.5
    assert abs(standard.std() - 1) < 5 / (2 * len(standard)) ** 0.5
    assert standard.abs().max() > 3.5  # normal, not uniform


def test_the_seed_decides_the_initial_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(create("resnet8", 10).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^no network is called 'VGG20'; .*\bvgg19\b[^\n]*$"):
        create("VGG20", 10)
