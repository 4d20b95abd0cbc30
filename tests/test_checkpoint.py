"""Every form of checkpoint that loads, and every reason for which one does not."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.models import NetworkInfo, create, load_network, names, save_network
from zoo_weights import fill, probe

INFO = NetworkInfo(
    architecture="resnet8",
    classes=["ant", "bee", "wasp — “stinging”"],
    mean=(0.1, 0.2, 1 / 3),
    std=(0.4, 0.5, 0.6),
    image_size=32,
)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A resnet8 for 3 classes whose counters are not 0, so that losing them would be seen."""
    model = fill(create("resnet8", 3)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(5)
    return model


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


def assert_refused(path: Path, *parts: str, num_classes: int | None = None) -> None:
    """Loading raises UserError whose message is one line with each of ``parts`` in it."""
    with pytest.raises(UserError) as caught:
        load_network(path, num_classes)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def test_our_file_comes_back_as_it_was(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "student.safetensors"
    save_network(path, network, INFO)
    before = torch.get_rng_state()
    for given in (path, str(path), tmp_path):  # the last as a run folder
        model, info, architecture = load_network(given, num_classes=3)
        assert (info, architecture) == (INFO, "resnet8")
        assert not any(module.training for module in model.modules())
        assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
        assert_same_state(model, network.state_dict())
        with torch.inference_mode():
            assert torch.equal(model(probe()), network(probe()))
    assert torch.equal(torch.get_rng_state(), before)
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]


def test_wrappers_layout_and_mode_leave_no_trace(tmp_path: Path, network: nn.Module) -> None:
    save_network(tmp_path / "plain.safetensors", network, INFO)
    plain = (tmp_path / "plain.safetensors").read_bytes()
    model = fill(create("resnet8", 3)).to(memory_format=torch.channels_last).train()
    model.load_state_dict(network.state_dict())
    for wrapped in (model, torch.compile(model), nn.DataParallel(torch.compile(model))):
        save_network(tmp_path / "wrapped.safetensors", wrapped, INFO)
        assert (tmp_path / "wrapped.safetensors").read_bytes() == plain


@pytest.mark.parametrize(
    ("suffix", "holder", "prefix"),
    [
        (".pt", None, ""),
        (".pth", "model", "module."),
        (".tar", "state_dict", "_orig_mod."),
        (".bin", "net", "module._orig_mod."),
        (".pth.tar", None, "_orig_mod.module."),
    ],
)
def test_foreign_torch_files(
    tmp_path: Path, network: nn.Module, suffix: str, holder: str | None, prefix: str
) -> None:
    state = prefixed(network.state_dict(), prefix)
    path = tmp_path / f"resnet{suffix}"
    torch.save(state if holder is None else {"epoch": 240, holder: state, "info": "best"}, path)
    model, info, architecture = load_network(path)
    assert (info, architecture) == (None, "resnet8")
    assert_same_state(model, network.state_dict())


def test_our_training_checkpoint(tmp_path: Path, network: nn.Module) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    content = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "info": asdict(INFO),
    }
    torch.save(content, tmp_path / "classroom-student.pt")
    model, info, architecture = load_network(tmp_path / "classroom-student.pt", 3)
    assert (info, architecture) == (INFO, "resnet8")
    assert_same_state(model, network.state_dict())


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_bare_safetensors(
    tmp_path: Path, network: nn.Module, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(prefixed(network.state_dict(), "module."), path, metadata)
    model, info, architecture = load_network(path)
    assert (info, architecture) == (None, "resnet8")
    assert_same_state(model, network.state_dict())


def test_half_precision_and_missing_counters(tmp_path: Path, network: nn.Module) -> None:
    state = {
        name: tensor.half()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "old.pt")
    model, _, _ = load_network(tmp_path / "old.pt")
    expected = {
        name: state[name].float() if name in state else torch.tensor(0)
        for name in network.state_dict()
    }
    assert_same_state(model, expected)


def test_every_network_is_recognised(tmp_path: Path) -> None:
    # Strided views of one number stand for the weights, so that the files stay small.
    for name in names():
        with torch.device("meta"):
            state = create(name, 10).state_dict()
        path = tmp_path / "network.pt"
        torch.save({n: torch.zeros(()).expand(t.shape) for n, t in state.items()}, path)
        model, info, architecture = load_network(path, num_classes=10)
        assert (info, architecture) == (None, name)
        assert {n: t.shape for n, t in model.state_dict().items()} == {
            n: t.shape for n, t in state.items()
        }


def test_missing_files(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no.pt", "there is no checkpoint", str(tmp_path / "no.pt"))
    assert_refused(tmp_path, "holds no student.safetensors", str(tmp_path))


def test_other_class_count(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "foreign.pt")
    save_network(tmp_path / "ours.safetensors", network, INFO)
    for file in ("foreign.pt", "ours.safetensors"):
        assert_refused(tmp_path / file, file, "3 classes", "100 are needed", num_classes=100)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"not a checkpoint " * 50,
        b"PK\x03\x04" + b"torn zip" * 50,
        b"\x80\x02torn pickle",
        bytes(range(256)) * 8,
    ],
    ids=["empty", "short", "text", "zip", "pickle", "bytes"],
)
def test_garbage(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(content)
    assert_refused(path, str(path), "is not a", "or is damaged")


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_truncated(tmp_path: Path, network: nn.Module, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(network.state_dict(), path)
    else:
        save_network(path, network, INFO)
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(path, str(path), "or is damaged")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (np.float64(0.7), "scalar"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_pickled_objects_are_refused_by_name(tmp_path: Path, value: object, kind: str) -> None:
    path = tmp_path / "objects.pt"
    torch.save({"model": {}, "best": value}, path)
    assert_refused(path, str(path), "holds a pickled", kind, "state_dict()")


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), {}, {"epoch": 3}, {"model": {}}, {"weights": {"a": torch.zeros(3)}}, [1, 2]],
)
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pt")
    assert_refused(tmp_path / "odd.pt", "odd.pt", "holds no state dict")


def test_another_network(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "other.pt"
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("layer2.0.bn2")}
    state["extra"] = torch.zeros(4)
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save(state, path)
    assert_refused(
        path,
        str(path),
        "the nearest, resnet8, differs",
        "missing: layer2.0.bn2.weight [32], layer2.0.bn2.bias [32], "
        "layer2.0.bn2.running_mean [32] and 1 more;",
        "unexpected: extra [4];",
        "of another shape: conv1.weight [16, 1, 3, 3] instead of [16, 3, 3, 3]",
    )
    torch.save({"weight": torch.zeros(2, 3), "fc.bias": torch.zeros(())}, path)
    assert_refused(path, str(path), "fits no network of the zoo", "unexpected: weight [2, 3]")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"architecture": "resnet9000"}, ["unknown network, 'resnet9000'"]),
        ({"architecture": "resnet14"}, ["resnet14 with 3 classes", "missing: layer1.1.conv1"]),
        ({"classes": ["a", "b"]}, ["2 classes", "fc.weight [3, 64] instead of [2, 64]"]),
    ],
)
def test_info_that_does_not_fit_the_weights(
    tmp_path: Path, network: nn.Module, change: dict, parts: list[str]
) -> None:
    path = tmp_path / "wrong.safetensors"
    save_network(path, network, NetworkInfo(**{**asdict(INFO), **change}))
    assert_refused(path, str(path), *parts)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": ["resnet8"]},
        {"classes": "abc"},
        {"classes": [1, 2, 3]},
        {"classes": []},
        {"mean": 0.5},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, "0.5"]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": [0.5, 0.5, 0.0]},
        {"std": None},
        {"image_size": "32"},
        {"image_size": 0},
        {"image_size": 32.0},
    ],
)
def test_damaged_info(tmp_path: Path, network: nn.Module, change: dict) -> None:
    info = {**asdict(INFO), **change}
    metadata = {"classroomkd": json.dumps(info)}
    safetensors.torch.save_file(network.state_dict(), tmp_path / "a.safetensors", metadata)
    torch.save({"model": network.state_dict(), "info": info}, tmp_path / "a.pt")
    (name,) = change
    for file in ("a.safetensors", "a.pt"):
        assert_refused(tmp_path / file, str(tmp_path / file), f"is damaged: its {name} cannot be")


def test_metadata_that_is_no_json(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(network.state_dict(), path, {"classroomkd": "{'mean': "})
    assert_refused(path, str(path), "metadata is not JSON")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_file_that_may_not_be_read(tmp_path: Path, network: nn.Module, name: str) -> None:
    save_network(tmp_path / name, network, INFO)
    (tmp_path / name).chmod(0)
    assert_refused(tmp_path / name, f"cannot read {tmp_path / name}: Permission denied")


def test_metadata_is_readable_json(tmp_path: Path, network: nn.Module) -> None:
    save_network(tmp_path / "a.safetensors", network, INFO)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        content = json.loads(file.metadata()["classroomkd"])
    assert content == json.loads(json.dumps(asdict(INFO)))
    assert re.fullmatch(r"\w+", content["architecture"])
