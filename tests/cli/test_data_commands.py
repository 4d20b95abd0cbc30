"""``classroomkd data``: what it prints and writes, and what a newcomer reads when it is wrong."""

from __future__ import annotations

import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from classroomkd import cli
from classroomkd.data import digits, join, list_source, load_source
from classroomkd.data.ffcv.beton import JPEG, RAW, open_beton, side_file, verify
from ffcv_required import requires_ffcv
from image_folders import make_cifar

CLASSES = ("cat", "dog", "Ελ")


def colour(k, i):
    return (40 * k + 10, 20 * i, 200)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """train/ and val/ of flat colours, 12 × 8 pixels, which say the class and the number."""
    root = tmp_path_factory.mktemp("source")
    for part, counts in (("train", (12, 3, 5)), ("val", (2, 2, 2))):
        for k, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 12), colour(k, i)).save(root / part / name / f"{i}.png")
    return root


def run(*arguments):
    return cli.main(["data", *map(str, arguments)])


def printed(capsys, *arguments):
    """What a command that succeeds prints."""
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def error(capsys, *arguments):
    """The message of a command that fails; always a single line, and nothing else."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("classroomkd: error: ")
    return line.removeprefix("classroomkd: error: ")


# ---------------------------------------------------------------- info


def test_info(source, capsys):
    lines = printed(capsys, "info", source, "--image-size", 8).splitlines()
    assert lines[0] == f"{source}: 3 classes"
    assert " ".join(lines[1].split()) == "images 12×8 pixels; brought to 8×8 pixels here"
    assert (
        " ".join(lines[2].split()) == "training part 20 images, 3 to 12 of each class, from train/"
    )
    assert " ".join(lines[3].split()) == "held-out part 6 images, 2 of each class, from val/"
    pixels = [colour(k, i) for k, count in enumerate((12, 3, 5)) for i in range(count)]
    for line, expected in zip(lines[4:6], (np.mean(pixels, 0), np.std(pixels, 0)), strict=True):
        numbers = [float(number) for number in re.findall(r"\d\.\d{4}", line)]
        assert numbers[:2] == pytest.approx(expected[:2] / 255, abs=5e-5)
    assert [line.split() for line in lines[6:]] == [
        ["12", "+", "2", "cat"],
        ["3", "+", "2", "dog"],
        ["5", "+", "2", "Ελ"],
    ]


def test_info_says_once_what_is_ignored_and_which_folder_is_which(tmp_path, capsys):
    for part in ("Train", "valid", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
        (tmp_path / part / "cat" / "notes.txt").touch()
    assert run("info", tmp_path) == 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("files ignored (not PNG, JPEG or WebP): 3 ")
    assert [" ".join(line.split()) for line in captured.out.splitlines()[2:5]] == [
        "training part 2 images, 1 of each class, from Train/",
        "validation part 2 images, 1 of each class, from valid/",
        "held-out part 2 images, 1 of each class, from test/",
    ]


def test_info_of_digits_and_many_classes(tmp_path, capsys):
    lines = printed(capsys, "info", "digits", "--test-share", 0.5).splitlines()
    assert " ".join(lines[1].split()) == "images 16×16 pixels"
    assert len(lines) == 6 + 10
    for k in range(25):
        (tmp_path / f"class{k:02}").mkdir()
        for i in range(2):
            Image.new("RGB", (4, 4), (k, i, 0)).save(tmp_path / f"class{k:02}" / f"{i}.png")
    sheet = tmp_path / "sheet.png"
    lines = printed(
        capsys, "info", tmp_path, "--image-size", 4, "--contact-sheet", sheet
    ).splitlines()
    assert lines[-3].split() == ["1", "+", "1", "class19"]
    assert lines[-2].strip() == "… and 5 classes more"
    assert Image.open(sheet).height == 20 * (48 + 2) + 2


def test_contact_sheet(source, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    arguments = ("info", source, "--image-size", 8, "--contact-sheet", sheet)
    assert printed(capsys, *arguments).splitlines()[-1] == f"contact sheet: {sheet}"
    image = Image.open(sheet)
    assert image.format == "PNG"
    pixels = np.asarray(image).astype(int)
    left = pixels.shape[1] - 10 * 50
    assert pixels.shape == (3 * 50 + 2, left + 500, 3)
    for k, count in enumerate((12, 3, 5)):
        for i in range(10):
            tile = pixels[2 + 50 * k : 50 + 50 * k, left + 50 * i : left + 50 * i + 48]
            assert (tile == (colour(k, i) if i < count else 255)).all()
        name = pixels[2 + 50 * k : 50 + 50 * k, :left]
        assert (name < 128).any()  # something is written
        assert (name[:, 0] == 255).all()
        assert (name[:, -1] == 255).all()
    before = sheet.read_bytes()
    assert error(capsys, *arguments).startswith(f"{sheet} exists already")
    assert sheet.read_bytes() == before


@requires_ffcv
def test_info_of_a_beton_file(source, tmp_path, capsys):
    out, sheet = tmp_path / "out.beton", tmp_path / "sheet.png"
    run("pack", source, out, "--image-size", 8)
    run("info", source, "--image-size", 8, "--contact-sheet", sheet)
    of_source = capsys.readouterr().out.splitlines()[1:]
    other = tmp_path / "other.png"
    lines = printed(capsys, "info", out, "--contact-sheet", other).splitlines()
    assert lines[0] == f"{out}: 3 classes"
    assert " ".join(lines[1].split()) == "images 8×8 pixels"
    assert " ".join(lines[2].split()) == "images in it 20 images, 3 to 12 of each class"
    numbers = re.compile(r"\d\.\d{4}")
    assert [numbers.findall(line) for line in lines[3:5]] == [
        numbers.findall(line) for line in of_source[4:6]
    ]
    assert other.read_bytes() == sheet.read_bytes()
    photos = tmp_path / "photos.beton"
    run("pack", source, photos, "--photos", "--raw", "--max-side", 6)
    capsys.readouterr()
    lines = printed(capsys, "info", photos, "--image-size", 3).splitlines()
    assert " ".join(lines[1].split()) == "images 6×4 pixels; brought to 3×3 pixels here"


# ---------------------------------------------------------------- pack and verify


@requires_ffcv
@pytest.mark.parametrize("part", ["train", "test", "all"])
def test_pack_and_verify(part, source, tmp_path, capsys):
    out = tmp_path / "out.beton"
    options = ("--part", part, "--image-size", "8")
    text = printed(capsys, "pack", source, out, *options)
    train, test = load_source(source, image_size=8)
    expected = {"train": train, "test": test, "all": join(train, test)}[part]
    assert text.startswith(f"{out}: {len(expected)} images of 3 classes, ")
    beton = verify(out, expected)
    digest = beton.sha256[:12]
    assert beton.classes == sorted(CLASSES)
    assert printed(capsys, "verify", out).endswith(f"images as packed (SHA-256 {digest}…)\n")
    text = printed(capsys, "verify", out, source, *options)
    assert (
        text == f"{out}: {len(expected)} images as in {source} and as packed (SHA-256 {digest}…)\n"
    )
    side_file(out).unlink()
    text = printed(capsys, "verify", out, source, *options)
    assert text == f"{out}: {len(expected)} images as in {source}\n"
    assert "give the data set" in error(capsys, "verify", out)
    if part == "all":
        message = error(capsys, "verify", out, source, "--image-size", 8)
        assert message == f"{out} has 26 images, the data set 20"


@requires_ffcv
def test_pack_digits(tmp_path, capsys):
    out = tmp_path / "out.beton"
    printed(capsys, "pack", "digits", out, "--seed", 3, "--test-share", 0.5, "--part", "test")
    verify(out, digits(3, 0.5)[1])
    message = error(capsys, "verify", out, "digits", "--test-share", 0.5, "--part", "test")
    assert message.startswith(f"{out}: ")
    printed(capsys, "pack", "digits", out, "--image-size", 12, "--overwrite")
    assert set(open_beton(out).heights) == {12}


@requires_ffcv
def test_pack_photos(source, tmp_path, capsys):
    for name, mode, options in (
        ("jpeg", JPEG, ()),
        ("raw", RAW, ("--raw",)),
        ("poor", JPEG, ("--quality", "20", "--max-side", "6")),
    ):
        out = tmp_path / f"{name}.beton"
        options = ("--photos", "--part", "all", *options)
        printed(capsys, "pack", source, out, *options)
        beton = open_beton(out)
        assert set(beton.modes) == {mode}
        assert (beton.heights[0], beton.widths[0]) == ((6, 4) if name == "poor" else (12, 8))
        assert "and as packed" in printed(capsys, "verify", out, source, *options)
    files = join(*list_source(source))
    assert [f.parent.name for f in files.files[::7]] == [
        beton.classes[k] for k in beton.targets[::7]
    ]


@requires_ffcv
def test_options_that_do_not_go_together(source, tmp_path, capsys):
    out = tmp_path / "out.beton"
    for options, message in (
        (["--max-side", "9"], "--max-side is for --photos, which is not given"),
        (["--quality", "9"], "--quality is for --photos, which is not given"),
        (["--raw"], "--raw is for --photos, which is not given"),
        (["--photos", "--image-size", "9"], "photographs keep their shapes: give --max-side"),
        (["--photos", "--raw", "--quality", "9"], "--quality is for JPEGs: give either"),
        (["--quality", "101"], "argument --quality: must be a whole number from 1 to 100, not 101"),
        (["--part", "both"], "argument --part: invalid choice: 'both'"),
    ):
        assert error(capsys, "pack", source, out, *options).startswith(message)
    assert error(capsys, "pack", "digits", out, "--photos").startswith("the digits are no photo")
    assert "argument SOURCE: must be a path, not empty" in error(capsys, "pack", "", out)
    assert "required: command" in error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_are_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("classroomkd.data.load_parts", None)
    existing = tmp_path / "out.beton"
    existing.write_bytes(b"precious")
    for out, message in (
        (existing, f"{existing} exists already: give another name, or --overwrite to replace it"),
        (tmp_path, f"{tmp_path} is a folder: give the name of a file to write"),
        (tmp_path / "a" / "b", f"no such folder: {tmp_path / 'a'}"),
    ):
        assert error(capsys, "pack", tmp_path, out) == message
        if out != tmp_path:
            message = message.removesuffix(", or --overwrite to replace it")  # it has none
            assert error(capsys, "info", tmp_path, "--contact-sheet", out) == message
    assert existing.read_bytes() == b"precious"


# ---------------------------------------------------------------- refusals and interruptions


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_folder_without_permission(source, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for command in (
        ["pack", source, locked / "out.beton"],
        ["info", source, "--contact-sheet", locked / "sheet.png"],
    ):
        assert "Permission denied" in error(capsys, *command)


def test_info_downloads_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("classroomkd.data.cifar.download", make_cifar)
    text = printed(capsys, "info", tmp_path / "new", "--download", "cifar100")
    assert text.startswith(f"{tmp_path / 'new'}: 100 classes")


def test_missing_ffcv_is_said_before_anything_is_read(source, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setattr("classroomkd.data.load_parts", None)
    out = tmp_path / "out.beton"
    assert error(capsys, "pack", source, out).startswith("FFCV is not installed")
    out.write_bytes(bytes(100))
    assert error(capsys, "verify", out, source).startswith("FFCV is not installed")
