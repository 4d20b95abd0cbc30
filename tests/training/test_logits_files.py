"""Files of logits: what is written is read, and what is damaged or another's is not."""

import json

import numpy as np
import pytest
import safetensors.numpy

from classroomkd import cli
from classroomkd.errors import UserError
from classroomkd.models.network_names import is_logits
from classroomkd.training.logits_files import KeptLogits, OwnLogits, logits_folder

SAMPLES = np.array([4, 0, 7])


def key(dtype="float32", **other):
    return {"mentor": "resnet8", "shape": [2, 9, 5], "dtype": dtype, "seed": 3} | other


def drawn(dtype="float32", rows=3, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 5)).astype(dtype)


@pytest.fixture
def opened(tmp_path):
    """Opens kept logits, which are closed in the end."""
    files = []

    def open_(**other):
        files.append(KeptLogits(tmp_path / "kept", key(**other)))
        return files[-1]

    yield open_
    for file in files:
        file.close()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read(opened, dtype):
    kept, logits = opened(dtype=dtype), drawn(dtype)
    assert not kept.read(2, SAMPLES).known.any()
    kept.write(2, SAMPLES, logits)
    kept.close()
    again = opened(dtype=dtype)
    rows = again.read(2, np.array([7, 1, 4]))
    assert rows.known.tolist() == [True, False, True]
    np.testing.assert_array_equal(rows.logits[[0, 2]], logits[[2, 0]])
    assert not again.read(1, SAMPLES).known.any()
    assert not again.damaged


def test_a_row_of_zeros_is_known_and_nan_is_kept(opened):
    kept, logits = opened(), np.zeros((3, 5), np.float32)
    logits[1] = np.nan
    kept.write(1, SAMPLES, logits)
    rows = kept.read(1, SAMPLES)
    assert rows.known.all()
    np.testing.assert_array_equal(rows.logits, logits)


@pytest.mark.parametrize("bit", [0, 7, 12, 31])
@pytest.mark.parametrize("words", [(2,), (1, 4), (0, 1, 2, 3, 4)])
def test_flipped_bits_are_found_in_their_row_alone(opened, bit, words):
    """Signs of two values too, whose changes cancel in a sum modulo 2³²."""
    kept = opened()
    kept.write(1, SAMPLES, drawn())
    raw = np.load(kept.folder / "logits.npy", mmap_mode="r+").view(np.uint32)
    raw[0, 7, list(words)] ^= np.uint32(1 << bit)
    assert kept.read(1, SAMPLES).known.tolist() == [True, True, False]
    assert kept.damaged == {1: 1}
    assert kept.verify() == (2, {1: 1})
    kept.write(1, SAMPLES, drawn())
    assert kept.verify() == (3, {})


def test_lost_pages_are_found(opened):
    """After a power failure tags may be on the disk without their rows."""
    kept = opened()
    kept.write(1, SAMPLES, drawn())
    np.load(kept.folder / "logits.npy", mmap_mode="r+")[:] = 0
    assert not kept.read(1, SAMPLES).known.any()


@pytest.mark.parametrize("cut", ["logits.npy", "tags.npy"])
def test_a_file_that_is_cut_short_is_begun_again(opened, cut):
    kept = opened()
    kept.write(1, SAMPLES, drawn())
    kept.close()
    with (kept.folder / cut).open("rb+") as file:
        file.truncate(150)
    again = opened()
    assert again.begun_again
    assert not again.read(1, SAMPLES).known.any()


def test_another_key_is_refused_with_what_differs(opened):
    opened().close()
    with pytest.raises(UserError, match=r'has another key: seed 3, not 4, images null, not "a"'):
        opened(seed=4, images="a")


def test_one_process_writes_and_another_takes_over(opened):
    """The second reads what the first writes, and writes nothing itself."""
    first, second = opened(), opened()
    assert (first.writes, second.writes) == (True, False)
    first.write(1, SAMPLES, drawn())
    second.write(1, np.array([1]), drawn(rows=1))
    assert second.read(1, SAMPLES).known.all()
    assert not first.read(1, np.array([1])).known.any()
    first.close()
    second.claim()
    second.write(1, np.array([1]), drawn(rows=1))
    assert second.read(1, np.array([1, 4])).known.all()


def test_disk_space_is_taken_when_files_are_begun(opened):
    """A full disk would otherwise end a process that writes to mapped memory."""
    kept = opened(shape=[50, 1000, 5])
    for name in ("logits.npy", "tags.npy"):
        stat = (kept.folder / name).stat()
        assert 512 * stat.st_blocks >= stat.st_size


def test_own_logits_as_npy_and_safetensors(tmp_path):
    values = np.random.default_rng(0).standard_normal((2, 9, 5)).astype(np.float16)
    np.save(tmp_path / "own.npy", values)
    safetensors.numpy.save_file({"logits": values}, tmp_path / "own.safetensors", {"of": "me"})
    for name in ("own.npy", "own.safetensors"):
        own = OwnLogits(tmp_path / name)
        assert own.shape == (2, 9, 5)
        rows = own.read(2, SAMPLES)
        assert rows.logits.dtype == np.float32
        assert rows.known.all()
        np.testing.assert_array_equal(rows.logits, values[1][SAMPLES].astype(np.float32))
    np.save(tmp_path / "one.npy", values[:1])
    np.testing.assert_array_equal(
        OwnLogits(tmp_path / "one.npy").read(5, SAMPLES).logits, values[0][SAMPLES]
    )


def test_files_that_are_not_logits(tmp_path):
    safetensors.numpy.save_file({"fc.weight": np.zeros((2, 2))}, tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"logits": np.zeros((2, 2))}, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 20)
    names = ("a.safetensors", "b.safetensors", "c.safetensors", "d.npy", "resnet8")
    assert [is_logits(str(tmp_path / name)) for name in names] == [False, True, False, True, False]
    with pytest.raises(UserError, match=r"b.safetensors holds \[2, 2\] of float64"):
        OwnLogits(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"cannot read the logits in .*d.npy"):
        OwnLogits(tmp_path / "d.npy")
    np.save(tmp_path / "e.npy", np.zeros((1, 2, 2), np.int64))
    with pytest.raises(UserError, match="of int64"):
        OwnLogits(tmp_path / "e.npy")


def test_the_command_lists_verifies_and_removes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path))
    assert cli.main(["cache"]) == 0
    assert "there is nothing in" in capsys.readouterr().out
    kept = KeptLogits(logits_folder() / "resnet8-1", key())
    kept.write(1, SAMPLES, drawn())
    assert cli.main(["cache"]) == 0
    assert (
        "resnet8-1: resnet8, seed 3: 2 epochs of 9 images of 5 classes" in capsys.readouterr().out
    )
    assert cli.main(["cache", "verify"]) == 0
    assert "resnet8-1: 3 of 18 rows stored, none damaged" in capsys.readouterr().out
    assert cli.main(["cache", "remove", "--all"]) == 2
    assert "in use by a run" in capsys.readouterr().err
    kept.close()
    np.load(kept.folder / "logits.npy", mmap_mode="r+")[0, 4] += 1
    assert cli.main(["cache", "verify", "resnet8-1"]) == 1
    printed = capsys.readouterr().out
    assert "resnet8-1: 2 of 18 rows stored, 1 damaged" in printed
    assert "epoch 1: 1 of 9 images are damaged" in printed
    (kept.folder / "tags.npy").unlink()
    assert cli.main(["cache", "verify"]) == 1
    for wrong in (["remove"], ["remove", "resnet9"], ["verify", "--all"]):
        assert cli.main(["cache", *wrong]) == 2
    (logits_folder() / "resnet8-2").mkdir()
    (logits_folder() / "resnet8-2" / "key.json").write_text(json.dumps(key())[:9])
    capsys.readouterr()
    assert cli.main(["cache"]) == 0
    assert "resnet8-2: empty or damaged: remove it" in capsys.readouterr().out
    assert cli.main(["cache", "remove", "resnet8-1"]) == 0
    assert [path.name for path in logits_folder().iterdir()] == ["resnet8-2"]
