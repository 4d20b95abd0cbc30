"""Networks of torchvision and timm: by name, with or without their weights, and back from disk."""

from __future__ import annotations

import importlib.util
import os
import sys
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from classroomkd.models import (
    NetworkInfo,
    create,
    external,
    load_network,
    load_pretrained,
    names,
    save_network,
)
from classroomkd.torchvision import import_torchvision
from refusals import refusal
from zoo_weights import fill

with_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm")
torchvision_models = import_torchvision("models")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch.hub keeps weights, empty; nothing can be downloaded."""

    def download(url: str, *_: object) -> None:
        raise urllib.error.URLError(OSError(f"no network\nfor {url}"))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    "name",
    [
        "tv:resnet18",
        "tv:resnet50",
        "tv:googlenet",
        "tv:inception_v3",
        "tv:mobilenet_v2",
        "tv:regnet_x_400mf",
        "tv:regnet_y_1_6gf",
        "tv:densenet169",
        "tv:efficientnet_b3",
        "tv:squeezenet1_1",
        "tv:vit_b_16",
        pytest.param("timm:mobilenetv1_100", marks=with_timm),
        pytest.param("timm:tf_mobilenetv3_small_minimal_100", marks=with_timm),
        pytest.param("timm:tf_mobilenetv3_large_minimal_100.in1k", marks=with_timm),
        pytest.param("timm:resnet18", marks=with_timm),
    ],
)
def test_names_build_networks_that_give_logits(name: str) -> None:
    size = 299 if name == "tv:inception_v3" else 224
    with torch.device("meta"):
        network = create(name, 7)
        images = torch.empty(2, 3, size, size)
    for mode in (True, False):
        logits = network.train(mode)(images)
        assert (type(logits), logits.shape, logits.device.type) == (torch.Tensor, (2, 7), "meta")


def test_a_network_on_the_cpu_has_its_librarys_initialisation() -> None:
    torch.manual_seed(0)
    ours = create("tv:mobilenet_v2", 7)
    torch.manual_seed(0)
    theirs = torchvision_models.mobilenet_v2(num_classes=7)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_building_without_values_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    build = external._build

    def read_values(name: str, num_classes: int) -> torch.nn.Module:
        network = build(name, num_classes)
        if next(network.parameters()).is_meta:
            raise NotImplementedError
        return network

    monkeypatch.setattr(external, "_build", read_values)
    before = torch.get_rng_state()
    with torch.device("meta"):
        network = external.build("tv:squeezenet1_1", 7)
    assert next(network.parameters()).is_meta
    assert torch.equal(torch.get_rng_state(), before)


@with_timm
def test_timms_names_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    with torch.device("meta"):
        create("timm:resnet18", 7)
        monkeypatch.delattr(timm, "list_pretrained")
        create("timm:resnet18", 7)


def test_unknown_names_are_told_the_nearest() -> None:
    message = refusal(create, "tv:ResNet35")
    assert message.startswith("no network is called 'tv:ResNet35'; the nearest names are tv:resnet")
    assert "tv:resnet34" in message
    assert "fasterrcnn" not in refusal(create, "tv:fasterrcnn_resnet50_fpn").split(";")[1]
    assert "resnet20" in refusal(create, "vt:resnet20")  # the zoo's
    assert not any(":" in name for name in names())


@with_timm
def test_unknown_names_of_timm_are_told_the_nearest() -> None:
    assert "timm:mobilenetv1_100" in refusal(create, "timm:mobilenetv1_101")
    assert "timm:resnet18.a1_in1k" in refusal(create, "timm:resnet18.a1_in1")


def test_without_timm_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal(create, "timm:resnet18").endswith("pip install timm")


def source_network(architecture: str, **options: object) -> nn.Module:
    return fill(torchvision_models.get_model(architecture, **options)).eval()


@pytest.mark.parametrize(
    ("architecture", "options", "size"),
    [
        ("squeezenet1_1", {}, 224),
        ("googlenet", {"init_weights": False, "transform_input": True}, 224),
        ("inception_v3", {"init_weights": False, "transform_input": True}, 299),
        ("densenet121", {}, 224),
    ],
)
def test_pretrained_weights(
    checkpoints: Path, tmp_path: Path, architecture: str, options: dict, size: int
) -> None:
    name = f"tv:{architecture}"
    weights = torchvision_models.get_model_weights(architecture).DEFAULT
    source = source_network(architecture, **options)
    checkpoints.mkdir(parents=True)
    torch.save(source.state_dict(), checkpoints / weights.url.rpartition("/")[2])

    network, info = load_pretrained(name)
    assert not any(module.training for module in network.modules())
    assert (info.architecture, info.mean, info.std) == (name, *IMAGENET)
    assert (len(info.classes), info.classes[:2]) == (1000, ["tench", "goldfish"])
    assert info.image_size == size
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        logits = source(images)
        assert torch.equal(network(images), logits)
        assert torch.equal(create(name, 1000, pretrained=True)(images), logits)
        save_network(tmp_path / "saved.safetensors", network, info)
        loaded = load_network(tmp_path / "saved.safetensors", 1000)
        assert loaded[1:] == (info, name)
        assert torch.equal(loaded[0](images), logits)


def test_weights_for_other_classes_are_refused(checkpoints: Path) -> None:
    weights = torchvision_models.get_model_weights("squeezenet1_1").DEFAULT
    checkpoints.mkdir(parents=True)
    file = checkpoints / weights.url.rpartition("/")[2]
    torch.save(source_network("squeezenet1_1").state_dict(), file)
    message = refusal(create, "tv:squeezenet1_1", 100, pretrained=True)
    assert "has 1000 classes, but 100 are needed" in message
    assert "resnet20 has no pretrained weights" in refusal(create, "resnet20", pretrained=True)


@with_timm
def test_pretrained_weights_of_timm(checkpoints: Path, tmp_path: Path) -> None:
    import timm

    name = "timm:tf_mobilenetv3_small_minimal_100"
    source = fill(timm.create_model(name.removeprefix("timm:"))).eval()
    checkpoints.mkdir(parents=True)
    safetensors.torch.save_file(
        source.state_dict(), checkpoints / "tf_mobilenetv3_small_minimal_100.in1k.safetensors"
    )
    network, info = load_pretrained(name)
    assert info == NetworkInfo(name, info.classes, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224)
    assert (len(info.classes), info.classes[0]) == (1000, "tench")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network(images), source(images))
        save_network(tmp_path / "saved.safetensors", network, info)
        assert torch.equal(load_network(tmp_path / "saved.safetensors")[0](images), source(images))


@pytest.mark.parametrize(
    ("name", "url", "file"),
    [
        (
            "tv:resnet34",
            "https://download.pytorch.org/models/resnet34-b627a593.pth",
            "resnet34-b627a593.pth",
        ),
        pytest.param(
            "timm:mobilenetv1_100",
            "https://huggingface.co/timm/mobilenetv1_100.ra4_e3600_r224_in1k/resolve/main/model.safetensors",
            "mobilenetv1_100.ra4_e3600_r224_in1k.safetensors",
            marks=with_timm,
        ),
    ],
)
def test_a_failed_download_says_what_to_put_where(
    checkpoints: Path, name: str, url: str, file: str
) -> None:
    assert refusal(load_pretrained, name) == (
        f"cannot download the weights of {name} (no network for {url}): "
        f"download {url} yourself and put it at {checkpoints / file}"
    )
    (checkpoints / file).write_bytes(b"not weights")
    message = refusal(load_pretrained, name)
    assert str(checkpoints / file) in message
    assert "damaged" in message


def test_a_download_is_checked_and_kept(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(url: str, file: str, sha256: str | None) -> None:
        calls.append((url.rpartition("/")[2], sha256))
        torch.save(source_network("squeezenet1_1").state_dict(), file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    load_pretrained("tv:squeezenet1_1")
    load_pretrained("tv:squeezenet1_1")
    assert calls == [("squeezenet1_1-b8a52dc0.pth", "b8a52dc0")]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_weights_cannot_run_code(checkpoints: Path, tmp_path: Path) -> None:
    checkpoints.mkdir(parents=True)
    state = {**source_network("squeezenet1_1").state_dict(), "more": Payload(tmp_path / "ran")}
    torch.save(state, checkpoints / "squeezenet1_1-b8a52dc0.pth")
    assert "squeezenet1_1-b8a52dc0.pth" in refusal(load_pretrained, "tv:squeezenet1_1")
    assert not (tmp_path / "ran").exists()


@with_timm
def test_weights_that_do_not_exist(checkpoints: Path) -> None:
    assert refusal(load_pretrained, "timm:resnet200") == (
        "timm's hub has no weights for timm:resnet200: use another network or train this one"
    )


@pytest.mark.parametrize(
    "name", ["tv:regnet_x_400mf", pytest.param("timm:levit_128s", marks=with_timm)]
)
def test_a_saved_network_comes_back(tmp_path: Path, name: str) -> None:
    # The second keeps indices in buffers that are not in its state dict.
    network = fill(create(name, 3)).eval()
    info = NetworkInfo(name, ["a", "b", "c"], *IMAGENET, 224)
    path = tmp_path / "student.safetensors"
    save_network(path, network, info)
    before = torch.get_rng_state()
    loaded, loaded_info, architecture = load_network(path, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded_info, architecture) == (info, name)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(loaded(images), network(images))


def test_saved_networks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    network = create("tv:squeezenet1_1", 3)
    for architecture, parts in {
        "tv:squeezenet1_0": ["claims to be tv:squeezenet1_0 with 3 classes but differs"],
        "tv:squeezenet": [str(path), "no network is called 'tv:squeezenet'"],
        "squeezenet1_1": [str(path), "unknown network"],
    }.items():
        save_network(path, network, NetworkInfo(architecture, ["a", "b", "c"], *IMAGENET, 224))
        message = refusal(load_network, path)
        assert all(part in message for part in parts), message
    save_network(path, network, NetworkInfo("tv:squeezenet1_1", ["a", "b", "c"], *IMAGENET, 224))
    assert "for 3 classes, but 4 are needed" in refusal(load_network, path, 4)
