"""``.beton`` files: read back by hand and by FFCV as it is, and every way for them to be wrong."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from classroomkd.data import ImageFiles, ImageSet
from classroomkd.data.ffcv import beton_file
from classroomkd.data.ffcv.beton import JPEG, RAW, open_beton, pack, side_file, verify
from classroomkd.data.ffcv.bindings import import_ffcv
from ffcv_required import requires_ffcv
from patience import LAST_RESORT
from refusals import refusal as error_of

pytestmark = requires_ffcv

CLASSES = ["ant", "bee", "chäf"]
HEADER, FIELD, LINE, ALLOCATION = 24, 1041, 24, 24  # bytes


def random_set(count=11, height=7, width=5, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return ImageSet(images, generator.integers(0, 3, count), CLASSES)


def photographs(folder, count=9, seed=0):
    """Smooth pictures of several shapes, as files."""
    generator = np.random.default_rng(seed)
    files = []
    for i in range(count):
        small = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        size = (int(generator.integers(40, 120)), int(generator.integers(30, 90)))
        files.append(folder / f"{i}.png")
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(files[-1])
    return ImageFiles(files, np.arange(count) % 3, CLASSES)


def read_by_hand(path):
    """Header, fields and samples of a file, from what the format says and nothing else."""
    data = Path(path).read_bytes()
    version, fields, page, count, end = struct.unpack_from("<HHIQQ", data)
    described = []
    for k in range(fields):
        kind, name = struct.unpack_from("<B16s", data, HEADER + k * FIELD)
        described.append((kind, name.rstrip(b"\0").decode()))
    samples = []
    for i in range(count):
        at = HEADER + fields * FIELD + i * LINE
        mode, width, height, start = struct.unpack_from("<BHHQ", data, at)
        (label,) = struct.unpack_from("<q", data, at + 16)
        samples.append((mode, height, width, start, label))
    table = [struct.unpack_from("<QQQ", data, end + i * ALLOCATION) for i in range(count)]
    assert len(data) == end + count * ALLOCATION
    return data, (version, page, count), described, samples, table


@pytest.fixture
def image_set():
    return random_set()


@pytest.fixture
def packed(image_set, tmp_path):
    pack(image_set, tmp_path / "set.beton")
    return tmp_path / "set.beton"


# ---------------------------------------------------------------- what is written


def test_layout_read_by_hand(packed, image_set):
    data, (version, page, count), fields, samples, table = read_by_hand(packed)
    assert (version, page, count) == (2, 2**21, 11)
    assert fields == [(2, "image"), (1, "label")]
    for i, (mode, height, width, start, label) in enumerate(samples):
        assert (mode, height, width, label) == (1, 7, 5, image_set.targets[i])
        assert data[start : start + 105] == image_set.images[i].tobytes()
        assert table[i] == (i, start, 105)
    assert sorted(path.name for path in packed.parent.iterdir()) == ["set.beton", "set.beton.json"]


def test_side_file(packed, image_set):
    digest = hashlib.sha256(image_set.targets.astype("<i8").tobytes())
    digest.update(b"\1" * 11 + b"\7\0" * 11 + b"\5\0" * 11 + image_set.images.tobytes())
    assert json.loads(side_file(packed).read_text(encoding="utf-8")) == {
        "classes": CLASSES,
        "images": 11,
        "bytes": packed.stat().st_size,
        "sha256": digest.hexdigest(),
    }
    umask = os.umask(0)
    os.umask(umask)
    for path in (packed, side_file(packed)):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_opened(packed, image_set):
    beton = open_beton(str(packed))
    assert (beton.path, len(beton), beton.classes) == (packed, 11, CLASSES)
    *_, samples, _ = read_by_hand(packed)
    assert beton.starts.tolist() == [sample[3] for sample in samples]
    assert beton.targets.dtype == beton.starts.dtype == beton.sizes.dtype == np.int64
    np.testing.assert_array_equal(beton.targets, image_set.targets)
    assert set(beton.heights) == {7}
    assert set(beton.widths) == {5}
    assert set(beton.modes) == {RAW}
    for i in range(11):
        image, target = beton[i]
        np.testing.assert_array_equal(image, image_set.images[i])
        assert target == image_set.targets[i]
    side_file(packed).unlink()
    assert open_beton(packed).classes == ["0", "1", "2"]
    assert open_beton(packed).sha256 is None


def test_same_images_give_the_same_bytes(packed, tmp_path):
    again = tmp_path / "again.beton"
    pack(random_set(), again)
    assert again.read_bytes() == packed.read_bytes()
    other = random_set()
    other.images[10, 6, 4, 2] ^= 1
    pack(other, again, overwrite=True)
    assert again.read_bytes() != packed.read_bytes()
    verify(again, other)


def test_more_images_than_a_page_and_strided_ones(tmp_path):
    whole = random_set(4000, 32, 16)
    image_set = ImageSet(whole.images[::2, :, ::2], whole.targets[::2], CLASSES)
    path = tmp_path / "many.beton"
    beton = pack(image_set, path)
    assert path.stat().st_size > 2 * 2**21
    data, *_, samples, _ = read_by_hand(path)
    for i in (0, 1, 999, 1999):
        start = samples[i][3]
        assert data[start : start + 768] == image_set.images[i].tobytes()
    assert verify(path, image_set).sha256 == beton.sha256


def test_photographs_as_jpeg_and_raw(tmp_path):
    files = photographs(tmp_path)
    raw = pack(files, tmp_path / "raw.beton", max_side=80)
    jpeg = pack(files, tmp_path / "jpeg.beton", jpeg=True, quality=95, max_side=80)
    assert set(raw.modes) == {RAW}
    assert set(jpeg.modes) == {JPEG}
    assert (tmp_path / "jpeg.beton").read_bytes() != (tmp_path / "raw.beton").read_bytes()
    shrunk = 0
    for i in range(len(files)):
        original, target = files[i]
        scale = min(1, 80 / max(original.shape))
        shrunk += scale < 1
        for beton in (raw, jpeg):
            image, label = beton[i]
            assert label == target
            assert image.shape == (beton.heights[i], beton.widths[i], 3)
            assert image.shape[:2] == pytest.approx(np.array(original.shape[:2]) * scale, abs=1)
            expected = np.asarray(Image.fromarray(original).resize(image.shape[1::-1], 1))
            limit = 0 if beton is raw and scale == 1 else 6
            assert np.abs(image.astype(int) - expected).mean() <= limit
    assert 0 < shrunk < len(files)
    verify(raw.path, files, max_side=80)
    verify(jpeg.path, files, max_side=80, quality=95)
    verify(jpeg.path, files, max_side=80, quality=90)  # near enough
    again = pack(files, tmp_path / "again.beton", jpeg=True, quality=95, max_side=80)
    assert again.path.read_bytes() == jpeg.path.read_bytes()


# ---------------------------------------------------------------- FFCV as it is

STOCK = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from ffcv import DatasetWriter, Loader
from ffcv.fields import FloatField, IntField, NDArrayField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder

folder = sys.argv[1]
for name in ("raw", "jpeg"):
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(f"{folder}/{name}.beton", 4, 1, drop_last=False, pipelines=pipelines)
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    images, labels = (np.concatenate(parts) for parts in zip(*batches))
    np.savez(f"{folder}/{name}.npz", images=images, labels=labels[:, 0])

class Set:
    def __init__(self, *columns):
        self.columns = columns
    def __len__(self):
        return len(self.columns[0])
    def __getitem__(self, i):
        return tuple(column[i] for column in self.columns)

read = np.load(f"{folder}/raw.npz")
image, label = RGBImageField(write_mode="raw"), IntField()
for name, fields, columns in (
    ("stock", {"image": image, "label": label}, (read["images"], read["labels"])),
    ("renamed", {"img": image, "label": label}, (read["images"], read["labels"])),
    ("swapped", {"label": label, "image": image}, (read["labels"], read["images"])),
    ("regression", {"covariate": NDArrayField(np.dtype("<f4"), (3,)), "label": FloatField()},
     (np.zeros((5, 3), np.float32), np.zeros(5))),
):
    writer = DatasetWriter(f"{folder}/{name}.beton", fields, num_workers=2)
    writer.from_indexed_dataset(Set(*columns), chunksize=2)
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Files of ours read, and others written, by a process that knows FFCV alone."""
    folder = tmp_path_factory.mktemp("stock")
    smooth = ImageSet(random_set().images // 16 + 100, random_set().targets, CLASSES)
    pack(random_set(), folder / "raw.beton")
    pack(smooth, folder / "jpeg.beton", jpeg=True)
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder)],
        capture_output=True,
        text=True,
        timeout=LAST_RESORT,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_ffcv_itself_reads_the_files(stock):
    image_set = random_set()
    raw, jpeg = (np.load(stock / f"{name}.npz") for name in ("raw", "jpeg"))
    np.testing.assert_array_equal(raw["images"], image_set.images)
    np.testing.assert_array_equal(raw["labels"], image_set.targets)
    np.testing.assert_array_equal(jpeg["labels"], image_set.targets)
    errors = np.abs(jpeg["images"].astype(int) - (image_set.images // 16 + 100))
    assert errors.mean() < 6


def test_files_that_ffcv_itself_wrote(stock, image_set):
    beton = open_beton(stock / "stock.beton")  # by two workers, so in no order
    assert beton.classes == ["0", "1", "2"]
    verify(stock / "stock.beton", image_set)
    message = error_of(verify, stock / "stock.beton")
    assert message.startswith(f"{stock / 'stock.beton'} has no stock.beton.json next to it")
    for name, fields in (
        ("renamed", "img, label"),
        ("swapped", "label, image"),
        ("regression", "covariate, label"),
    ):
        message = error_of(open_beton, stock / f"{name}.beton")
        assert message.startswith(f"{stock / name}.beton has the fields {fields}, instead of")


IMPORT = """
import gc, sys

class NoDistutils:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "distutils":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoDistutils())
import numba, numba.typed, numpy as np, torch

torch.set_num_threads(3)
typed_dict, threads = numba.typed.Dict, numba.get_num_threads()

@numba.njit
def total(values):
    return values.sum()

assert total(np.ones(3, np.uint8)) == 3
from classroomkd.data.ffcv.bindings import import_ffcv

assert import_ffcv() is import_ffcv() is sys.modules["ffcv"]
assert (torch.get_num_threads(), numba.get_num_threads()) == (3, threads)
assert numba.typed.Dict is typed_dict and "distutils" not in sys.modules
from ffcv import Loader
from ffcv.fields.decoders import SimpleRGBImageDecoder

loader = Loader(sys.argv[1], 4, 1, pipelines={"image": [SimpleRGBImageDecoder()], "label": None})
assert [images.shape for images, in loader] == [(4, 7, 5, 3)] * 2
del loader
assert numba.uint8[::1].mutable
del total
gc.collect()
"""


def test_import_leaves_the_process_as_it_was(packed):
    """Nor is anything printed when code that was compiled before is collected."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(packed)],
        capture_output=True,
        text=True,
        timeout=LAST_RESORT,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("missing", ["ffcv", "cv2", "numba"])
def test_missing_package_is_named(missing, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    threads = torch.get_num_threads()
    message = error_of(import_ffcv)
    what = "is not installed" if missing == "ffcv" else f"cannot be imported (import of {missing}"
    assert message.startswith(f"FFCV {what}")
    assert message.endswith("scripts/install_ffcv.sh in the repository installs it")
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------- packing that fails


def contents(folder):
    """Digests, for pytest takes minutes to tell how megabytes differ."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture(params=["new", "overwritten"])
def target(request, tmp_path, monkeypatch):
    """A path to pack to, and a check that a failure left everything as it was."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "set.beton"
    if request.param == "overwritten":
        pack(random_set(seed=1), path)
    before = contents(folder)
    segments = []

    class Recorded(shared_memory.SharedMemory):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            segments.append(self.name)

    monkeypatch.setattr("ffcv.writer.shared_memory.SharedMemory", Recorded)
    yield path
    assert contents(folder) == before
    for name in segments:
        with pytest.raises(FileNotFoundError):
            shared_memory.SharedMemory(name)


class Interrupted(ImageSet):
    def __getitem__(self, index):
        if index == 7 and sys._getframe(1).f_back.f_code.co_name == "_read_ahead":
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(index)


def test_interrupted(target):
    whole = random_set()
    # A process that a shell put in the background begins with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pack(Interrupted(whole.images, whole.targets, CLASSES), target, overwrite=True)
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupted_while_syncing(target, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("classroomkd.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(random_set(), target, overwrite=True)


def test_interrupted_between_two_pages(target, monkeypatch):
    """Where FFCV's own way out would wait for itself."""
    from classroomkd.data.ffcv.beton_writer import _Allocator

    flush = _Allocator.flush_page
    calls = []

    def interrupted(self):
        calls.append(self.my_page)
        assert len(calls) < 3, "flushed again on the way out"
        flush(self)
        if self.my_page == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Allocator, "flush_page", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(random_set(2000, 32, 32), target, overwrite=True)
    assert calls == [-1, 0]


@pytest.mark.parametrize("old", ["none", "alone", "whole"])
@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_killed_between_two_renames(tmp_path, monkeypatch, old, renamed):
    """Whichever file is there then, its own record is found, though the other's would fit it."""

    def replace(*arguments):
        if next(calls) == renamed:
            raise KeyboardInterrupt
        os_replace(*arguments)

    first, second = (random_set(seed=seed) for seed in (0, 3))
    second = ImageSet(second.images, second.targets, ["x", "y", "z"])
    path, calls, os_replace = tmp_path / "set.beton", itertools.count(), os.replace
    if old != "none":
        pack(first, path)
    if old == "alone":
        side_file(path).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("classroomkd.files.os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            pack(second, path, overwrite=True)
    if renamed == 2:  # the side file could have lost its ``next`` only
        assert verify(path, second).classes == ["x", "y", "z"]
        assert open_beton(path).sha256 == second.digest()
    elif old == "none":
        assert not path.exists()
    else:
        assert verify(path, first).classes == (CLASSES if old == "whole" else ["0", "1", "2"])
        assert open_beton(path).sha256 == (first.digest() if old == "whole" else None)
    pack(first, path, overwrite=True)
    assert verify(path, first).classes == CLASSES
    assert "next" not in json.loads(side_file(path).read_text(encoding="utf-8"))


def test_replaced_while_it_is_opened(packed, monkeypatch):
    """Between the reading of one of the two files and that of the other."""
    others = [random_set(seed=seed) for seed in (3, 4)]
    others = [ImageSet(other.images, other.targets, ["x", "y", "z"]) for other in others]
    read, left = beton_file.read_record, list(others)

    def slow(*arguments):
        record = read(*arguments)
        if left:
            pack(left.pop(0), packed, overwrite=True)
        return record

    monkeypatch.setattr(beton_file, "read_record", slow)
    beton = open_beton(packed)
    assert (beton.classes, beton.digest()) == (["x", "y", "z"], beton.sha256)
    assert beton.sha256 == others[1].digest()


def test_replaced_after_it_was_opened(packed, image_set):
    beton = open_beton(packed)
    pack(random_set(seed=1), packed, overwrite=True)
    np.testing.assert_array_equal(beton[3][0], image_set.images[3])
    assert beton.digest() == image_set.digest()


def test_writes_that_take_only_a_part(tmp_path, monkeypatch):
    """As a file may when a disk is nearly full: the rest must follow, or an error."""

    class Half(io.FileIO):
        def write(self, data):
            return super().write(memoryview(data)[: max(len(data) // 2, 1)])

    def half_open(path, mode, buffering=-1):
        raw = Half(path, mode.replace("b", ""))
        return raw if buffering == 0 else io.BufferedWriter(raw)

    monkeypatch.setattr("classroomkd.data.ffcv.beton_writer.open", half_open, raising=False)
    pack(random_set(2000, 32, 32), tmp_path / "set.beton")
    verify(tmp_path / "set.beton", random_set(2000, 32, 32))


@pytest.mark.parametrize("bad", [0, 5, 8])
def test_damaged_image_is_named(bad, target, tmp_path):
    files = photographs(tmp_path)
    files.files[bad].write_bytes(files.files[bad].read_bytes()[:-30])
    message = error_of(pack, files, target, overwrite=True, jpeg=True)
    assert message.startswith(f"{files.files[bad]} cannot be read")


def test_full_disk(target, tmp_path):
    """The system itself refuses, in the middle of a page, after having taken a part of it."""
    image_set = random_set(9000, 32, 32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            pack(image_set, target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(target)


def test_too_little_space(target, monkeypatch):
    usage = shutil.disk_usage(target.parent)._replace(free=30_000_000)
    monkeypatch.setattr("classroomkd.data.ffcv.beton.shutil.disk_usage", lambda _: usage)
    image_set = random_set(10_000, 32, 32)
    message = error_of(pack, image_set, target, overwrite=True)
    assert message.startswith(f"{target} will need about 34 MB, but {target.parent} has 30 MB free")


def test_space_is_estimated_from_what_is_stored(tmp_path, monkeypatch):
    sizes = {}
    for count, side in ((3000, 32), (10, 8), (2500, 28)):
        path = tmp_path / f"{count}.beton"
        pack(random_set(count, side, side), path)
        sizes[count, side] = path.stat().st_size
    for (count, side), size in sizes.items():
        for free in (size - 1_000_000, size + 1_000_000):
            usage = shutil.disk_usage(tmp_path)._replace(free=free)
            monkeypatch.setattr(
                "classroomkd.data.ffcv.beton.shutil.disk_usage", lambda _, u=usage: u
            )
            if free < size:
                error_of(pack, random_set(count, side, side), tmp_path / "new.beton")
            else:
                pack(random_set(count, side, side), tmp_path / "new.beton", overwrite=True)


def test_existing_file_is_not_overwritten(packed, tmp_path):
    before = packed.read_bytes()
    message = error_of(pack, random_set(seed=5), packed)
    assert message.startswith(f"{packed} exists already")
    assert packed.read_bytes() == before
    pack(random_set(seed=5), packed, overwrite=True)
    verify(packed, random_set(seed=5))
    assert error_of(pack, random_set(), tmp_path).startswith(f"{tmp_path} is a folder")
    assert error_of(pack, random_set(), tmp_path / "a" / "b") == f"no such folder: {tmp_path / 'a'}"
    assert "no images to pack" in error_of(pack, random_set(0), tmp_path / "empty.beton")


def test_images_that_the_format_cannot_hold(tmp_path):
    files = photographs(tmp_path, 3)
    Image.new("RGB", (600, 1)).save(files.files[1])
    message = error_of(pack, files, tmp_path / "thin.beton", max_side=500)
    assert message.startswith(f"{files.files[1]} is 1×600 pixels")
    Image.new("RGB", (2400, 2400)).save(files.files[1])
    message = error_of(pack, files, tmp_path / "large.beton")
    assert message.startswith(f"{files.files[1]} is 2400×2400 pixels, which is too large")
    assert pack(files, tmp_path / "large.beton", max_side=2400).widths[1] == 2400
    long = ImageSet(np.zeros((1, 1, 65536, 3), np.uint8), [0], ["a"])
    message = error_of(pack, long, tmp_path / "long.beton")
    assert message.startswith("image 0 is 1×65536 pixels, which is too large")
    pack(ImageSet(long.images[:, :, :65535], [0], ["a"]), tmp_path / "long.beton")
    assert open_beton(tmp_path / "long.beton").widths.tolist() == [65535]


# ---------------------------------------------------------------- files that are wrong


@pytest.mark.parametrize("has_side_file", [False, True])
def test_truncated_anywhere(packed, has_side_file):
    data = packed.read_bytes()
    if not has_side_file:
        side_file(packed).unlink()
    tables = HEADER + 2 * FIELD
    for size in (0, 1, 2, 23, 24, 25, HEADER + FIELD, tables - 1, tables, tables + 50, 2**21 - 1):
        packed.write_bytes(data[:size])
        assert str(packed) in error_of(open_beton, packed)
    for missing in (1, 7, 24, 11 * 24 - 1, 11 * 24, 11 * 24 + 1, 2**20, 2**21):
        packed.write_bytes(data[:-missing])
        message = error_of(open_beton, packed)
        assert message.startswith(f"{packed} ")
        assert "truncated" in message
    packed.write_bytes(data + b"\0")
    assert str(packed) in error_of(open_beton, packed)
    packed.write_bytes(data)
    open_beton(packed)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"some words\n" * 500, b"\x89PNG\r\n\x1a\n" + bytes(99), bytes(10_000)]
)
def test_other_files(content, tmp_path):
    path = tmp_path / "other.beton"
    path.write_bytes(content)
    assert error_of(open_beton, path).startswith(f"{path} is not a .beton file")


def test_no_file(tmp_path):
    assert error_of(open_beton, tmp_path) == f"{tmp_path} is a folder: give a .beton file"
    assert error_of(open_beton, tmp_path / "a") == f"no such file: {tmp_path / 'a'}"


def test_file_that_was_never_finished(packed):
    data = packed.read_bytes()
    side_file(packed).unlink()
    packed.write_bytes(data[:16] + bytes(8) + data[24:])
    assert error_of(open_beton, packed).startswith(f"{packed} was never finished")


def test_every_byte_of_the_tables_counts(tmp_path):
    """Nothing but a UserError, whatever they say, and never equality with the source."""
    image_set, path = random_set(3), tmp_path / "set.beton"
    pack(image_set, path)
    side_file(path).unlink()
    data = path.read_bytes()
    names = [HEADER + k * FIELD + at for k in range(2) for at in range(1 + len("image") + 1)]
    lines = HEADER + 2 * FIELD
    samples = [lines + i * LINE + at for i in range(3) for at in (*range(13), *range(16, 24))]
    positions = [*range(HEADER), *names, *samples, *range(len(data) - 3 * ALLOCATION, len(data))]
    with open(path, "rb+", buffering=0) as file:
        for at in positions:
            for change in (0x01, 0x80, 0xFF):
                file.seek(at)
                file.write(bytes([data[at] ^ change]))
                assert str(path) in error_of(verify, path, image_set)
            file.seek(at)
            file.write(data[at : at + 1])
    verify(path, image_set)


def edited(path, at, form, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, *values)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "form", "value", "what"),
    [
        (0, "<B", 2, "has an unknown mode"),
        (1, "<H", 6, "has the wrong number of bytes"),
        (3, "<H", 0, "has no pixels"),
        (5, "<Q", 2**21 + 1, "has two positions"),
        (16, "<q", -1, "has a target outside its 3 classes"),
        (16, "<q", 3, "has a target outside its 3 classes"),
    ],
)
def test_index_of_a_wrong_entry_is_named(packed, at, form, value, what):
    edited(packed, HEADER + 2 * FIELD + 4 * LINE + at, form, value)
    assert error_of(open_beton, packed).startswith(f"{packed} is corrupt: image 4 {what}")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (2**21 + 105 * 3, "overlaps another"),
        (HEADER, "lies outside the file"),
        (2**22, "lies outside the file"),
        (2**64 - 50, "lies outside the file"),
        (2**63, "lies outside the file"),
    ],
)
def test_images_outside_the_file_or_each_other(packed, start, what):
    edited(packed, HEADER + 2 * FIELD + 4 * LINE + 5, "<Q", start)
    edited(packed, packed.stat().st_size - (11 - 4) * ALLOCATION + 8, "<Q", start)
    message = error_of(open_beton, packed)
    assert message.startswith(f"{packed} is corrupt: image ")
    assert what in message


def test_huge_label_without_a_side_file(packed):
    side_file(packed).unlink()
    edited(packed, HEADER + 2 * FIELD + 16, "<q", 2**62)
    assert "image 0 has a target outside its" in error_of(open_beton, packed)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"classes": "abc", "images": 11, "bytes": 1, "sha256": ""}', b"\xff"],
)
def test_damaged_side_file(packed, content):
    side_file(packed).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert error_of(open_beton, packed).startswith(f"{side_file(packed)} is damaged")


def test_side_file_of_another_file(packed, tmp_path):
    pack(random_set(12), tmp_path / "other.beton")
    side_file(tmp_path / "other.beton").replace(side_file(packed))
    message = error_of(open_beton, packed)
    assert message.startswith(f"{packed} has ")
    assert "but set.beton.json says" in message
    pack(random_set(11, seed=7), tmp_path / "other.beton", overwrite=True)
    side_file(tmp_path / "other.beton").replace(side_file(packed))
    open_beton(packed)  # by its sizes it could be
    assert "match the SHA-256 in set.beton.json" in error_of(verify, packed)


# ---------------------------------------------------------------- verifying


def test_flipped_bytes(packed, image_set):
    start = open_beton(packed).starts[6]
    data = bytearray(packed.read_bytes())
    data[start + 3 * (2 * 5 + 4) + 1] ^= 0x10
    packed.write_bytes(data)
    message = error_of(verify, packed, image_set)
    assert message == (
        f"{packed}: image 6 differs from image 6 in the data set, first at row 2, column 4"
    )
    assert "match the SHA-256 in set.beton.json" in error_of(verify, packed)


def test_wrong_source(packed, image_set):
    images, targets = image_set.images, image_set.targets
    assert verify(packed, image_set).sha256 == verify(packed).sha256
    for other, what in (
        (ImageSet(images[:-1], targets[:-1], CLASSES), "has 11 images, the data set 10"),
        (ImageSet(images, targets, ["ant", "bee", "cow"]), "has other classes than the data set"),
        (ImageSet(images, (targets + (np.arange(11) == 9)) % 3, CLASSES), "target of image 9 is"),
        (ImageSet(images[:, :, 1:], targets, CLASSES), "image 0 is [7, 5, 3], image 0 in"),
        (random_set(seed=1), "target of image"),
    ):
        message = error_of(verify, packed, other)
        assert message.startswith(str(packed))
        assert what in message


def test_photographs_that_differ(tmp_path):
    files = photographs(tmp_path)
    for jpeg in (True, False):
        path = tmp_path / f"{jpeg}.beton"
        beton = pack(files, path, jpeg=jpeg)
        side_file(path).unlink()
        name = str(files.files[4])
        kept = files.files[4].read_bytes()
        image = np.asarray(Image.open(files.files[4]))
        Image.fromarray(255 - image).save(files.files[4])
        message = error_of(verify, path, files)
        assert f"{path}: image 4 differs from {name} in the data set" in message
        Image.fromarray(image[1:]).save(files.files[4])
        assert f"{name} in the data set [" in error_of(verify, path, files)
        files.files[4].write_bytes(kept)
        verify(path, files)
    path = tmp_path / "True.beton"
    data = bytearray(path.read_bytes())
    beton = open_beton(path)
    data[beton.starts[3] : beton.starts[3] + beton.sizes[3]] = bytes(beton.sizes[3])
    path.write_bytes(data)
    assert error_of(verify, path, files).startswith(f"{path}: image 3 cannot be read")
