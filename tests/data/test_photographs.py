"""Photographs of any size, from class folders through the loaders to a trained network."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from classroomkd import cli
from classroomkd.data import (
    CentreCrop,
    ImageFiles,
    Loaders,
    Mixing,
    RandomResizedCrop,
    backends,
    cache,
    list_source,
    load_source,
    split_off,
)
from classroomkd.data.decoding import read_files
from classroomkd.data.ffcv import beton
from classroomkd.errors import UserError
from classroomkd.models import create, load_network
from classroomkd.runs.images import open_loaders, read_images, training_augmentation
from classroomkd.runs.paths import recorded_data
from classroomkd.runs.recipe import DataConfig, load_recipe
from classroomkd.training.evaluation import evaluation_crop
from ffcv_required import requires_ffcv
from slow_augmentation import slow_mix

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["blue", "green", "red"]
BACKENDS = [pytest.param("ffcv", marks=requires_ffcv), "torch"]


def photograph(file: Path, channel: int, rng: np.random.Generator) -> None:
    """A smooth pattern of any shape, in which one channel is brighter."""
    coarse = rng.integers(0, 150, (5, 5, 3), dtype=np.uint8)
    coarse[..., channel] += 80
    width, height = rng.integers(40, 110, 2).tolist()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.save(file, quality=95)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """train/ and val/ of three classes, 10 and 4 photographs each."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 4)):
        for channel, name in enumerate(reversed(CLASSES)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                photograph(root / part / name / f"{i}.jpg", channel, rng)
    return root


def config(photos: Path | str, **values) -> DataConfig:
    return DataConfig(source=str(photos), crop="resize", image_size=32, **values)


def error_of(capsys, *arguments: object) -> str:
    """The message of a command that fails; always a single line."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    return line.removeprefix("classroomkd: error: ")


# ---------------------------------------------------------------- sets of files


def test_digest_is_of_targets_and_contents(photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    train, test = list_source(copy)
    assert train.digest() == list_source(photos)[0].digest()  # wherever they lie
    assert train.digest() != test.digest()
    others = [
        ImageFiles(train.files, np.roll(train.targets, 1), train.classes),
        ImageFiles(train.files[::-1], train.targets, train.classes),
        ImageFiles(train.files[:-1], train.targets[:-1], train.classes),
    ]
    digests = {train.digest(), *(other.digest() for other in others)}
    photograph(train.files[7], 0, np.random.default_rng(1))
    assert len(digests | {train.digest()}) == 5


def test_files_are_read_again_only_if_they_changed(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(photos, tmp_path / "copy")
    files = list_source(tmp_path / "copy")[0]
    digest = files.digest()
    read, reads = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda file: reads.append(file) or read(file))
    assert files.digest() == digest
    assert reads == []
    os.utime(files.files[3], ns=(1, 1))
    assert files.digest() == digest
    assert sorted(reads) == sorted(files.files)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "file" / "cache"))
    assert files.digest() == digest
    files.files[2].unlink()
    with pytest.raises(OSError, match=re.escape(str(files.files[2]))):
        cache.files_digest(files.files)


def test_splits_are_those_of_decoded_images(photos):
    for path in (photos, photos / "train"):
        decoded = load_source(path, image_size=8, seed=3, test_share=0.3)
        listed = list_source(path, 3, 0.3)
        sets = [(*split_off(train, 0.2, 5), test) for train, test in (decoded, listed)]
        for images, files in zip(*sets, strict=True):
            assert files.classes == images.classes == CLASSES
            assert files.targets.tolist() == images.targets.tolist()
            assert np.array_equal(read_files(files.files, 8), images.images)


def test_sources_that_are_no_photographs(tmp_path):
    with pytest.raises(UserError, match="the digits are no photographs to crop and resize: take"):
        read_images(config("digits"), 0)
    with pytest.raises(UserError, match="cifar10 are no photographs"):
        read_images(config(tmp_path), 0, download="cifar10")


# ---------------------------------------------------------------- recipes


def test_what_a_recipe_makes_of_photographs():
    data = load_recipe(values={"data": {"crop": "resize", "image_size": 64}}).data
    assert (data.mean, data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    own = load_recipe(overrides=["data.crop=resize", "data.mean=[0,0,0]", "data.std=[1,1,1]"]).data
    assert (own.mean, own.std) == ([0, 0, 0], [1, 1, 1])
    assert load_recipe().data.mean is None
    for override, message in (
        (["data.cutout=4"], "data.cutout must be 0 with crop: resize, not 4"),
        (["data.crop=centre"], "data.crop: "),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(overrides=["data.crop=resize", *override])


# ---------------------------------------------------------------- loaders


def batches_of(backend: str, data: DataConfig, training: bool, seed: int = 0, **others):
    sets = read_images(data, 0)
    image_set = sets[0] if training else sets[1]
    loaders = open_loaders(backend, list(sets.sets().values()), data.image_size, "cpu")
    assert loaders.backend == backend
    crop = training_augmentation(data) if training else evaluation_crop(image_set, data.image_size)
    options = {"shuffle": training, "drop_last": False, "augmentation": crop, "seed": seed}
    options |= others
    with loaders.open(image_set, 8, mean=(0, 0, 0), std=(1, 1, 1), **options) as loader:
        return [torch.cat(parts) for parts in zip(*loader, strict=True)]


@requires_ffcv
@pytest.mark.parametrize("training", [True, False])
def test_both_loaders_crop_alike(photos, training):
    data = config(photos)
    ours, theirs = (batches_of(backend, data, training) for backend in ("ffcv", "torch"))
    assert ours[0].shape == (30 if training else 12, 3, 32, 32)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[2])
    # They resize in their own ways, and ffcv's are compressed once more.
    assert (ours[0] - theirs[0]).abs().mean() < 0.01
    if training:
        others = batches_of("ffcv", data, training, seed=1)
        assert not torch.equal(ours[2], others[2])
        by_index = [images[indices.argsort()] for images, _, indices in (ours, others)]
        assert (by_index[0] - by_index[1]).abs().mean() > 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_are_mixed(photos, backend):
    """Of 30 photographs in batches of 8, each with the next one of its batch."""
    data, mixing = config(photos), Mixing(3, mixup=0.4, cutmix=1.0)
    images, targets, indices = batches_of(backend, data, True)
    mixed, shares, same = batches_of(backend, data, True, mixing=mixing)
    assert torch.equal(indices, same)
    for batch in torch.arange(30).split(8):
        arguments = images[batch], targets[batch].tolist(), 0, 0, indices[batch].tolist()
        expected, labels = slow_mix(mixing, *arguments)
        assert torch.equal(mixed[batch], expected)
        assert torch.equal(shares[batch], labels)


def test_the_crops_are_those_of_the_recipe(photos):
    data = config(photos, flip=False)
    crop = training_augmentation(data)
    assert (crop.size, crop.flip, crop.area) == (32, False, (0.08, 1.0))
    assert evaluation_crop(read_images(data, 0)[1], 48) == CentreCrop(48, 224 / 256)
    decoded = DataConfig(source=str(photos), image_size=16, padding=2, cutout=3)
    after = training_augmentation(decoded)
    assert (after.padding, after.flip, after.cutout) == (2, True, 3)
    assert evaluation_crop(read_images(decoded, 0)[1], 16) is None


@requires_ffcv
def test_photographs_are_packed_once_as_jpegs(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path))
    files = list_source(photos)[1]
    path = backends.packed(files)
    packed = beton.open_beton(path)
    assert set(packed.modes) == {beton.JPEG}
    assert packed.classes == CLASSES
    assert packed.targets.tolist() == files.targets.tolist()
    assert [(h, w, 3) for h, w in zip(packed.heights, packed.widths, strict=True)] == [
        files[i][0].shape for i in range(len(files))
    ]
    written = path.stat().st_mtime_ns
    assert backends.packed(files) == path
    assert path.stat().st_mtime_ns == written
    smaller = backends.packed(files, max_side=30)
    assert smaller != path
    small = beton.open_beton(smaller)
    assert set(np.maximum(small.heights, small.widths)) == {29, 30}  # FFCV rounds down
    os.truncate(path, 500)
    beton.verify(backends.packed(files), files)


@requires_ffcv
def test_larger_images_have_larger_photographs(photos, monkeypatch):
    sides = []
    monkeypatch.setattr(
        backends, "packed", lambda _, max_side: sides.append(max_side) or Path("x.beton")
    )
    for size in (32, 256, 512):
        open_loaders("ffcv", [list_source(photos)[1]], size, "cpu")
    assert sides == [500, 500, 1000]


def test_which_loader_photographs_get(photos, monkeypatch):
    files = list_source(photos)[1]
    with pytest.raises(UserError, match="photographs differ: use the loader ffcv or torch"):
        Loaders("resident", [files], "cpu")

    def fail(*_):
        raise UserError("FFCV cannot be imported (no such module)")

    monkeypatch.setattr(backends, "packed", fail)
    loaders = Loaders("auto", [files], "cpu")
    assert (loaders.backend, loaders.reason) == (
        "torch",
        "FFCV cannot be imported (no such module)",
    )


# ---------------------------------------------------------------- training

TRAIN = (
    *("--student", "tv:shufflenet_v2_x0_5", "--mentors", "resnet8", "--image-size", "32"),
    *("--batch-size", "6", "--epochs", "2", "data.crop=resize", "store=false"),
)


def measured(text: str) -> list[float]:
    """Images, top-1 and loss that evaluate printed."""
    found = (re.search(rf"^{name} +([\d.]+)", text, re.M) for name in ("images", "top-1", "loss"))
    return [float(match[1]) for match in found]


@pytest.mark.parametrize("backend", BACKENDS)
def test_train_then_evaluate_agree(photos, tmp_path, capsys, monkeypatch, backend):
    crops, open_loader = set(), Loaders.open

    def record(self, image_set, batch_size, **options):
        crops.add((options["shuffle"], options["augmentation"]))
        return open_loader(self, image_set, batch_size, **options)

    monkeypatch.setattr(Loaders, "open", record)
    out = tmp_path / "run"
    assert (
        cli.main(["train", "--data", str(photos), *TRAIN, "--loader", backend, "--out", str(out)])
        == 0
    )
    assert crops == {(True, RandomResizedCrop(32)), (False, CentreCrop(32))}
    assert f"loader: {backend} (requested)" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"]["train_images"] == 27
    assert summary["data"]["validation_images"] == 3
    result = next(r for r in summary["results"] if r["phase"] == "student")
    assert result["name"] == "tv:shufflenet_v2_x0_5"
    _, info, architecture = load_network(out)
    assert architecture == "tv:shufflenet_v2_x0_5"
    assert (info.image_size, info.mean) == (32, (0.485, 0.456, 0.406))
    assert cli.main(["evaluate", str(out), "--data", str(photos)]) == 0
    images, top1, loss = measured(capsys.readouterr().out)
    assert images == 12
    assert top1 == pytest.approx(100 * result["top1"], abs=0.01)
    assert loss == pytest.approx(result["loss"], abs=1e-4)
    # Somewhere else a network does not say that its images were photographs.
    moved = shutil.copy(out / "student.safetensors", tmp_path / "moved.safetensors")
    options = ["evaluate", str(moved), "--data", str(photos)]
    assert cli.main(options) == 0
    assert measured(capsys.readouterr().out)[2] != loss
    assert cli.main([*options, "--crop", "resize", "--all"]) == 0
    assert measured(capsys.readouterr().out)[0] == 42


def test_both_halves_of_an_interrupted_run_are_the_whole(photos, tmp_path, capsys, states_kept):
    """The student's first epoch is done when the run ends; the second is the same either way."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ["--data", str(photos), *TRAIN, "alone=false", "threads=1", "--loader", "torch"]
    assert cli.main(["train", *options, "--out", str(whole)]) == 0
    shutil.copytree(whole, halves)
    (halves / "summary.json").unlink()
    folder = halves / "checkpoints" / "student-tv:shufflenet_v2_x0_5"
    (folder / "done.json").unlink()
    states = sorted(folder.glob("*.pt"))
    assert len(states) == 2
    states[1].unlink()
    assert cli.main(["train", "--resume", str(halves)]) == 0
    assert (halves / "student.safetensors").read_bytes() == (
        whole / "student.safetensors"
    ).read_bytes()


def test_what_cannot_be_trained(photos, tmp_path, capsys):
    train = ("train", "--data", photos, "--out", tmp_path / "run", *TRAIN)
    message = error_of(capsys, *train, "--student", "tv:squeezenet1_1", "--image-size", 8)
    assert message.startswith("tv:squeezenet1_1 cannot train on images of 8×8 pixels")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_damaged_photograph_is_named(photos, tmp_path, capsys, backend):
    shutil.copytree(photos, tmp_path / "copy")
    damaged = tmp_path / "copy" / "train" / "green" / "4.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    train = ("train", "--data", tmp_path / "copy", *TRAIN, "--out", tmp_path / "run")
    message = error_of(capsys, *train, "--loader", backend)
    assert message.startswith(f"{damaged} cannot be read")


def test_a_network_that_does_not_say_how_it_saw_images(photos, tmp_path, capsys):
    torch.save(create("resnet8", 3).state_dict(), tmp_path / "theirs.pt")
    evaluate = ("evaluate", tmp_path / "theirs.pt", "--data", photos)
    assert "does not say how its images were prepared" in error_of(
        capsys, *evaluate, "--crop", "resize"
    )


def test_the_config_of_a_run_says_the_crop(photos, tmp_path):
    text = {"seed": 3, "data": {"test_share": 0.5, "split_seed": 7, "crop": "resize"}}
    for loader in ("auto", "torch"):
        text["data"]["loader"] = loader
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(text))
        assert recorded_data(tmp_path / "student.safetensors")[1] == {
            "seed": 7,
            "test_share": 0.5,
            "crop": "resize",
            "loader": loader,
        }
