"""Every form of checkpoint that loads, and every reason for which one does not."""

from __future__ import annotations

import argparse
import collections
import datetime
import fractions
import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.models import (
    NetworkInfo,
    create,
    external,
    load_network,
    names,
    save_network,
    weight_files,
)
from classroomkd.models.network_names import split_entry
from classroomkd.torchvision import import_torchvision
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
        (".ckpt", "state_dict", "model."),
        (".ckpt", "model_state_dict", "net."),
        (".ckpt", "network", "student."),
        (".ckpt", "params", "teacher."),
        (".ckpt", "weights", "module.student."),
        (".ckpt", "model_ema", "student.module."),
        (".ckpt", "state_dict_ema", "_orig_mod.backbone."),
        (".ckpt", "ema", "backbone._orig_mod.module."),
        (".ckpt", "module", "anything.at.all."),
    ],
)
def test_any_prefix_in_any_container(
    tmp_path: Path, network: nn.Module, suffix: str, holder: str | None, prefix: str
) -> None:
    state = prefixed(network.state_dict(), prefix)
    path = tmp_path / f"resnet{suffix}"
    torch.save(state if holder is None else {"epoch": 240, holder: state, "info": "best"}, path)
    told: list[str] = []
    model, info, architecture = load_network(path, notify=told.append)
    assert (info, architecture, told) == (None, "resnet8", [])
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
    assert_refused(
        path, str(path), "is not a", "damaged" if content else "empty: download it again"
    )


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_truncated(tmp_path: Path, network: nn.Module, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(network.state_dict(), path)
    else:
        save_network(path, network, INFO)
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(path, str(path), "truncated or damaged")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_pickled_objects_are_refused_by_name(tmp_path: Path, value: object, kind: str) -> None:
    path = tmp_path / "objects.pt"
    torch.save({"model": {}, "best": value}, path)
    assert_refused(path, str(path), "holds a pickled", kind, "state_dict()")


def test_harmless_values_beside_the_weights(tmp_path: Path, network: nn.Module) -> None:
    beside = {
        "scalar": np.float64(0.7),
        "flag": np.bool_(True),
        "dtype": np.dtype("float32"),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "objects": np.array([{}, "x"], dtype=object),
        "bytes": b"",
        "args": argparse.Namespace(lr=0.1, out=Path("runs/x")),
        "ordered": collections.OrderedDict(a=1),
        "path": Path("data/cifar"),
        "windows": pathlib.PureWindowsPath("data"),
        "time": datetime.datetime.now(datetime.UTC),
        "took": datetime.timedelta(hours=3),
    }
    path = tmp_path / "whole.pth"
    torch.save({"state_dict": network.state_dict(), **beside}, path)
    assert_same_state(load_network(path)[0], network.state_dict())
    content = weight_files.read(path)
    assert content.keys() == {"state_dict", *beside}
    assert content["args"].lr == 0.1
    assert content["ordered"] == beside["ordered"]
    for name in beside.keys() - {"args", "ordered"}:
        assert vars(content[name]) == {}


def test_values_of_omegaconf(tmp_path: Path, network: nn.Module) -> None:
    values = {"lr": 0.1, "steps": [1, 2.5, None, "x", True], "again": "${lr}", "of": {"a": {}}}
    for config in (values, OmegaConf.create(values)):
        content = {"hyper_parameters": config, "state_dict": network.state_dict()}
        torch.save(content, tmp_path / "configured.ckpt")
        model, _, _ = load_network(tmp_path / "configured.ckpt")
        assert_same_state(model, network.state_dict())


class Payload:
    """Calls a function, and sets a state, when it is unpickled without care."""

    def __init__(self, function: object, *arguments: object, state: object = None) -> None:
        self.call = function, arguments, state

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("within", ["alone", "dtype", "array", "namespace", "config"])
def test_no_code_runs(tmp_path: Path, network: nn.Module, within: str, legacy: bool) -> None:
    ran = tmp_path / "ran"
    payload: object = Payload(os.mkdir, str(ran))
    if within == "dtype":
        payload = Payload(np._core.multiarray.scalar, np.dtype("float64"), payload)
    elif within == "array":
        payload = np.array([payload], dtype=object)
    elif within == "namespace":
        payload = argparse.Namespace(call=payload)
    elif within == "config":
        payload = Payload(eval, f"__import__('os').mkdir({str(ran)!r})")
    path = tmp_path / "evil.pth"
    torch.save(
        {"state_dict": network.state_dict(), "more": payload},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(UserError, match=r"evil\.pth"):
        load_network(path)
    assert not ran.exists()
    torch.load(path, weights_only=False) if within in ("alone", "config") else None
    assert ran.exists() == (within in ("alone", "config"))  # the payload is a real one


def test_no_interpolation_is_resolved(
    tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLASSROOMKD_SECRET", "hush")
    path = tmp_path / "evil.ckpt"
    config = Payload(dict, OmegaConf.create({"a": "${oc.env:CLASSROOMKD_SECRET}"}))
    torch.save({"state_dict": network.state_dict(), "more": config}, path)
    assert_same_state(load_network(path)[0], network.state_dict())
    assert vars(weight_files.read(path)["more"]) == {}
    assert torch.load(path, weights_only=False)["more"] == {"a": "hush"}  # it is a real payload


def test_an_array_cannot_point_into_memory(tmp_path: Path, network: nn.Module) -> None:
    # Bytes that a type without NumPy's flags for objects says are a pointer, to be swapped.
    fields = {"a": (np.dtype("O"), 0)}
    dtype = Payload(np.dtype, "V8", False, True, state=(3, ">", None, ("a",), fields, 8, 1, 0))
    array = Payload(
        np._core.multiarray._reconstruct,
        *(np.ndarray, (0,), b"b"),
        state=(1, (1,), dtype, False, b"\x41" * 8),
    )
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": network.state_dict(), "more": array}, path)
    code = "import sys; from classroomkd.models import load_network; load_network(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=300)


def test_of_several_the_plain_one_is_taken_and_told(tmp_path: Path, network: nn.Module) -> None:
    average = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    plain = network.state_dict()
    path = tmp_path / "both.pth"
    torch.save({"model_ema": prefixed(average, "module."), "model": plain}, path)
    told: list[str] = []
    assert_same_state(load_network(path, notify=told.append)[0], plain)
    assert told == [f"{path}: used model, not model_ema (to select it: {path}:model_ema)"]
    assert_same_state(load_network(f"{path}:model")[0], plain)
    for entry in ("model_ema", "model_ema.module"):
        assert_same_state(load_network(f"{path}:{entry}", notify=told.append)[0], average)
    assert len(told) == 1
    assert_refused(f"{path}:ema", str(path), "has no entry 'ema'", "model_ema, model")


@pytest.mark.parametrize(
    ("entry", "is_plain"),
    [
        ("ema", False),
        ("model_ema", False),
        ("state_dict_ema", False),
        ("ema_model", False),
        ("model.swa_state_dict", False),
        ("mean_teacher", False),
        ("teacher_net", False),
        ("averaged_model", False),
        ("moving_average", False),
        ("shadow_params", False),
        ("polyak", False),
        ("momentum_encoder", False),
        ("optimizer.exp_avg", False),
        ("optimiser", False),
        ("exp_avg_sq", False),
        ("semantic", True),
        ("remap", True),
        ("average_pool", True),
        ("state_dict.avgpool", True),
        ("schema", True),
    ],
)
def test_averages_are_taken_after_plain_weights(
    tmp_path: Path, network: nn.Module, entry: str, is_plain: bool
) -> None:
    # Written before the other, it is taken unless its name says that it is not plain.
    other = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    content: dict = other
    for key in reversed(entry.split(".")):
        content = {key: content}
    torch.save(content | {"weights": network.state_dict()}, tmp_path / "a.pth")
    model, _, _ = load_network(tmp_path / "a.pth", notify=lambda _: None)
    assert_same_state(model, other if is_plain else network.state_dict())


def test_plain_weights_come_before_those_that_are_recognised_sooner(tmp_path: Path) -> None:
    tv = import_torchvision("models")
    student, teacher = tv.resnet18(num_classes=7), tv.resnet50(num_classes=7)
    path = tmp_path / "distilled.pth"
    for content, other in (
        ({"teacher": create("resnet20", 7).state_dict(), "model": student.state_dict()}, "teacher"),
        ({"teacher": teacher.state_dict(), "model": student.state_dict()}, "teacher"),
        ({"model": student.state_dict(), "other": teacher.state_dict()}, "other"),
    ):
        torch.save(content, path)
        told: list[str] = []
        model, _, architecture = load_network(path, notify=told.append)
        assert architecture == "tv:resnet18"
        assert_same_state(model, student.state_dict())
        assert f"used model, not {other} (to select it: {path}:{other})" in told[0]


def test_other_libraries_are_not_asked_for_a_network_of_the_zoo(
    tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(external, "named")  # which imports timm
    torch.save(network.state_dict(), tmp_path / "a.pth")
    assert load_network(tmp_path / "a.pth")[2] == "resnet8"


def test_an_entry_is_looked_for_at_the_start_first(tmp_path: Path, network: nn.Module) -> None:
    inner = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    content = {"best": {"ema": inner}, "ema": {"teacher": inner, "student": network.state_dict()}}
    torch.save(content, tmp_path / "a.pth")
    model, _, _ = load_network(f"{tmp_path / 'a.pth'}:ema", notify=lambda _: None)
    assert_same_state(model, network.state_dict())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda weight: weight.to("meta"), "is on the meta device, without values"),
        (lambda weight: weight.to_sparse(), "is not dense"),
        (lambda weight: weight.to(torch.complex64), "is torch.complex64"),
        (lambda weight: weight > 0, "is torch.bool"),
        (lambda weight: weight.to(torch.int8), "is torch.int8"),
    ],
)
def test_weights_that_are_no_dense_floats(
    tmp_path: Path, network: nn.Module, changed: Callable[[Tensor], Tensor], told: str
) -> None:
    state = dict(network.state_dict())
    state["layer1.0.conv1.weight"] = changed(state["layer1.0.conv1.weight"])
    torch.save({"model": state}, tmp_path / "odd.pth")
    assert_refused(tmp_path / "odd.pth", "odd.pth", f"resnet8 whose layer1.0.conv1.weight {told}")


def test_odd_tensors_and_values_do_not_disturb(tmp_path: Path, network: nn.Module) -> None:
    expected = dict(network.state_dict())
    counter = "layer1.0.bn1.num_batches_tracked"
    expected[counter] = torch.tensor(0)
    state = {**expected, counter: torch.zeros(2), "bn1.num_batches_tracked": torch.tensor(5.0)}
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)
    path = tmp_path / "odd.pth"
    torch.save({"model": state, "__metadata__": 3, "boxes": nested}, path)
    told: list[str] = []
    assert_same_state(load_network(path, notify=told.append)[0], expected)
    assert told == [f"{path}: left out: {counter}"]


def test_a_network_for_no_classes(tmp_path: Path) -> None:
    torch.save(create("resnet8", 0).state_dict(), tmp_path / "none.pth")
    assert_refused(tmp_path / "none.pth", "none.pth is a resnet8 for 0 classes")


def test_what_images_are_normalised_by_is_left_out(tmp_path: Path, network: nn.Module) -> None:
    state = prefixed(network.state_dict(), "module.")
    names = ["module.mean", "module.std", "pixel_mean", "pixel_std"]
    path = tmp_path / "normalised.pth"
    for first, second in (names[:2], names[2:]):
        torch.save(state | {first: torch.zeros(3), second: torch.ones(3, 1, 1)}, path)
        told: list[str] = []
        assert_same_state(load_network(path, notify=told.append)[0], network.state_dict())
        assert told == [f"{path}: left out: {first}, {second}"]


def test_a_files_kind_is_told_by_its_content(tmp_path: Path, network: nn.Module) -> None:
    save_network(tmp_path / "student.bin", network, INFO)
    torch.save({"model": network.state_dict()}, tmp_path / "student.safetensors")
    assert load_network(tmp_path / "student.bin")[1] == INFO
    assert load_network(tmp_path / "student.safetensors")[1] is None


def test_student_and_teacher_in_one_state_dict(tmp_path: Path, network: nn.Module) -> None:
    teacher = fill(create("resnet14", 3)).state_dict()
    state = prefixed(teacher, "teacher.") | prefixed(network.state_dict(), "student.")
    path = tmp_path / "distilled.ckpt"
    torch.save({"state_dict": state}, path)
    told: list[str] = []
    assert_same_state(load_network(path, notify=told.append)[0], network.state_dict())
    assert "used state_dict.student, not state_dict.teacher" in told[0]
    assert "left out: teacher." in told[0]
    model, _, architecture = load_network(f"{path}:teacher", notify=told.append)
    assert architecture == "resnet14"
    assert_same_state(model, teacher)


def test_what_is_no_weight_is_left_out_and_told(tmp_path: Path, network: nn.Module) -> None:
    state = prefixed(network.state_dict(), "module.")
    state |= {"n_averaged": torch.tensor(3), "criterion.weight": torch.ones(3)}
    for profiled in ("", "conv1.", "layer1.0.bn1."):
        state |= {f"module.{profiled}total_ops": torch.zeros(1)}
        state |= {f"module.{profiled}total_params": torch.zeros(1)}
    state["module.fc.num_batches_tracked"] = torch.tensor(7)
    path = tmp_path / "profiled.pth"
    torch.save(state, path)
    with pytest.warns(UserWarning, match="left out: n_averaged, criterion.weight, .* and 6 more"):
        model, _, _ = load_network(path)
    assert_same_state(model, network.state_dict())


def test_weights_of_a_network_are_never_left_out(tmp_path: Path) -> None:
    # Without its shortcuts a resnet20 has the names and shapes of a resnet20_a.
    state = create("resnet20", 10).state_dict()
    state["layer2.0.downsample.2.weight"] = torch.zeros(32)
    torch.save(state, tmp_path / "more.pth")
    assert_refused(tmp_path / "more.pth", "nearest, resnet20,", "layer2.0.downsample.2.weight [32]")


def test_names_with_colons(
    tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "epoch:3.pth"
    torch.save(network.state_dict(), path)
    torch.save({"model": create("resnet14").state_dict()}, tmp_path / "epoch")
    assert load_network(path)[2] == "resnet8"
    assert load_network(f"{tmp_path / 'epoch'}:model")[2] == "resnet14"
    torch.save({"epoch:3": {"a:b": network.state_dict()}}, tmp_path / "keys.pth")
    for entry in ("epoch:3", "a:b", "epoch:3.a:b"):
        assert load_network(f"{tmp_path / 'keys.pth'}:{entry}")[2] == "resnet8"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_network("~/epoch:model")[2] == "resnet14"
    assert split_entry(path) == (path, None)
    assert split_entry("C:\\weights.pth") == (Path("C:\\weights.pth"), None)
    assert split_entry("no.pth:model") == (Path("no.pth"), "model")


def test_what_a_file_is_that_is_no_checkpoint(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1099231\n"
    (tmp_path / "pointer.pth").write_text(pointer)
    (tmp_path / "pointer.safetensors").write_text(pointer)
    (tmp_path / "page.pth").write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("model.pth", b"")
    for name, part in {
        "script.pt": "is a TorchScript archive",
        "pointer.pth": "is a Git LFS pointer",
        "pointer.safetensors": "is a Git LFS pointer",
        "page.pth": "is a web page",
        "zip.pth": "is a zip archive, not a checkpoint",
    }.items():
        assert_refused(tmp_path / name, str(tmp_path / name), part)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), {}, {"epoch": 3}, {"model": {}}, {"weights": {1: torch.zeros(3)}}, [1, 2]],
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
        "with another shape: conv1.weight [16, 1, 3, 3] instead of [16, 3, 3, 3]",
    )
    torch.save({"weight": torch.zeros(2, 3), "fc.bias": torch.zeros(())}, path)
    assert_refused(path, str(path), "fits no network of the zoo", "unexpected: weight [2, 3]")
    assert_refused(path, "docs/networks.md")


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
    known = {name: value for name, value in asdict(INFO).items() if value is not None}
    assert content == json.loads(json.dumps(known))
    assert re.fullmatch(r"\w+", content["architecture"])
