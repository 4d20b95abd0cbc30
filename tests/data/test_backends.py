"""Which loader a run gets, why, and that its numbers do not depend on it."""

import errno
import os
import threading
import time

import pytest
import torch
from rich.console import Console

from classroomkd.data import Loaders, ResidentLoader, TorchLoader, backends
from classroomkd.data.ffcv import beton
from classroomkd.errors import UserError
from classroomkd.runs.recipe import load_recipe
from classroomkd.runs.training_run import TrainingRun
from ffcv_required import requires_ffcv
from loader_cases import MEAN, STD, random_set
from patience import LAST_RESORT

OPTIONS = {"mean": MEAN, "std": STD, "augmentation": None, "shuffle": False, "drop_last": False}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_ffcv(monkeypatch):
    def fail(*_):
        raise UserError("FFCV cannot be imported (no such module)")

    monkeypatch.setattr(backends, "packed", fail)


@requires_ffcv
def test_auto_takes_ffcv_where_it_is_installed(cache):
    image_set = random_set()
    loaders = Loaders("auto", [image_set], "cpu")
    assert (loaders.backend, loaders.reason) == ("ffcv", f"files in {cache}")
    with loaders.open(image_set, 4, **OPTIONS) as loader:
        assert type(loader).__name__ == "FFCVLoader"
        assert torch.cat([indices for *_, indices in loader]).tolist() == list(range(23))


def test_auto_without_ffcv(without_ffcv, monkeypatch):
    image_set = random_set()  # 23 · 6 · 5 · 3 = 2,070 bytes
    loaders = Loaders("auto", [image_set], "cpu")
    assert loaders.backend == "resident"
    assert loaders.reason == "FFCV cannot be imported (no such module)"
    with loaders.open(image_set, 4, **OPTIONS) as loader:
        assert type(loader) is ResidentLoader
    for free, backend in ((2 * 2070, "resident"), (2 * 2070 - 1, "torch")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**9))
        loaders = Loaders("auto", [image_set], "cuda")
        assert loaders.backend == backend
    assert "0.0 GB of images and 0.0 GB free on the GPU" in loaders.reason
    with pytest.raises(UserError, match="FFCV cannot be imported"):
        Loaders("ffcv", [image_set], "cpu")


def test_a_back_end_by_name():
    image_set = random_set()
    for name, kind in (("resident", ResidentLoader), ("torch", TorchLoader)):
        loaders = Loaders(name, [image_set], "cpu")
        assert (loaders.backend, loaders.reason) == (name, "requested")
        with loaders.open(image_set, 4, **OPTIONS) as loader:
            assert type(loader) is kind
    with pytest.raises(UserError, match="no loader 'dali': choose one of auto, ffcv, resident"):
        Loaders("dali", [image_set], "cpu")


@requires_ffcv
def test_auto_without_a_cache_to_write_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "file" / "cache"))
    loaders = Loaders("auto", [random_set()], "cpu")
    assert loaders.backend == "resident"
    assert str(tmp_path / "file") in loaders.reason
    with pytest.raises(OSError, match="file"):
        Loaders("ffcv", [random_set()], "cpu")


@requires_ffcv
def test_a_set_is_packed_once(cache, monkeypatch):
    path = backends.packed(random_set())
    assert path.parent == cache
    written = path.stat().st_mtime_ns
    assert backends.packed(random_set()) == path
    assert path.stat().st_mtime_ns == written
    assert beton.open_beton(path).digest() == beton.open_beton(path).sha256
    others = random_set(seed=1), random_set(count=22)
    assert len({path, *map(backends.packed, others)}) == 3
    renamed = random_set()
    renamed.classes[0] = "z"
    assert beton.open_beton(backends.packed(renamed)).classes == ["z", "b", "c", "d"]
    os.truncate(path, 1000)
    assert backends.packed(random_set()) == path
    beton.verify(path, random_set())


def no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks available")


@requires_ffcv
@pytest.mark.parametrize("locked", [True, False])
def test_a_set_is_packed_by_one_at_a_time(cache, monkeypatch, locked):
    """Processes that begin together wait for the first; threads stand for them."""
    packings, pack = [], beton.pack

    def slow(*arguments, **options):
        packings.append(time.sleep(0.3))
        return pack(*arguments, **options)

    monkeypatch.setattr(beton, "pack", slow)
    if not locked:  # a file system without locks
        monkeypatch.setattr("fcntl.flock", no_locks)
    sets = [random_set() for _ in range(1 + 3 * locked)]
    threads = [threading.Thread(target=backends.packed, args=[one]) for one in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LAST_RESORT)
    assert len(packings) == 1
    beton.verify(backends.packed(random_set()), random_set())


@requires_ffcv
def test_what_killed_packings_left_is_removed(cache):
    cache.mkdir()
    (cache / ".0123-4567.beton.abc.unfinished").write_bytes(bytes(100))
    path = backends.packed(random_set())
    assert {file.name for file in cache.iterdir()} == {path.name, f"{path.name}.json", ".lock"}


@requires_ffcv
@pytest.mark.parametrize("name", ["ffcv", "resident"])
def test_sets_are_known_by_themselves(name):
    """Another may have the address, and so the ``id``, of one that is gone."""
    loaders = Loaders(name, [random_set(seed=seed) for seed in range(3)], "cpu")
    for _ in range(3):
        with pytest.raises(UserError, match="not one of those given to the constructor"):
            loaders.open(random_set(seed=9), 4, **OPTIONS)


@requires_ffcv
@pytest.mark.parametrize("loader", ["ffcv", "torch"])
def test_a_run_is_the_same_through_every_loader(tmp_path, loader):
    """All records but the times, and the weights, to the bit."""

    def run(loader):
        recipe = load_recipe(
            values={
                "student": "resnet8",
                "mentors": ["resnet8"],
                "data": {"source": "noise", "image_size": 8, "loader": loader},
                "training": {"epochs": 2, "batch_size": 16},
                "mentor_training": {"epochs": 1, "batch_size": 16},
                "store": False,
                "device": "cpu",
            }
        )
        sets = random_set(60, 8, 8), random_set(20, 8, 8, seed=1)
        with open(os.devnull, "w") as nothing:
            classroom = TrainingRun(recipe, Console(file=nothing))
            summary = classroom.run(*sets, tmp_path / loader)
        weights = (tmp_path / loader / "student.safetensors").read_bytes()
        return summary["results"], weights

    assert run(loader) == run("resident")
