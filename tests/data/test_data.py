"""Sources: files, arrays and data sets, decoded at once or on use."""

import contextlib
import hashlib
import io
import os
import pickle
import types
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from classroomkd.data import (
    ImageFiles,
    ImageSet,
    digits,
    from_dataset,
    is_split_by_seed,
    join,
    list_parts,
    list_source,
    load_parts,
    load_source,
)
from classroomkd.data.decoding import read_size
from classroomkd.torchvision import import_torchvision
from image_folders import Python2Pickler, make_cifar, python2
from refusals import refusal

# ---------------------------------------------------------------- making small data sets


def pixels(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)


def make_tree(root, parts=("train", "val"), classes=("cat", "dog"), count=3):
    """PNG files of random pixels; returns {path relative to root: pixels}."""
    made = {}
    for part in parts:
        for name in classes:
            for i in range(count):
                path = root / part / name / f"{i}.png"
                made[str(path.relative_to(root))] = pixels(len(made))
                write(path, made[str(path.relative_to(root))])
    return made


def load(path, **options):
    return load_source(path, **{"image_size": 8, **options})


def error_of(path, **options):
    """The message of the UserError that loading raises; always a single line."""
    return refusal(load, path, **options)


# ---------------------------------------------------------------- class folders


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "test"), ("train", "val", "test")])
def test_tree_with_held_out_part(tmp_path, parts):
    made = make_tree(tmp_path, parts, classes=("dog", "Ant", "cat"))
    train, test = load(tmp_path)
    for image_set, part in ((train, "train"), (test, parts[-1])):
        assert image_set.classes == ["Ant", "cat", "dog"]
        assert image_set.targets.dtype == np.int64
        assert image_set.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        expected = [made[f"{part}/{name}/{i}.png"] for name in train.classes for i in range(3)]
        assert image_set.images.dtype == np.uint8
        np.testing.assert_array_equal(image_set.images, expected)
        assert len(image_set) == 9


def test_files_are_in_natural_order_and_others_are_ignored(tmp_path, monkeypatch):
    names = ["b2.png", "b10.PNG", "b1.png", "a.webp", "b02.png", "².png"]
    for part in ("train", "val"):
        for i, name in enumerate(names):
            write(tmp_path / part / "x" / name, pixels(i), lossless=True)
            write(tmp_path / part / "y" / name, pixels(i), lossless=True)
        (tmp_path / part / "x" / "notes.txt").write_text("not an image")
        (tmp_path / part / "x" / "._b1.png").write_bytes(b"a Mac's metadata")
        (tmp_path / part / "x" / "folder.png").mkdir()
        (tmp_path / part / ".cache").mkdir()
    order = ["a.webp", "b1.png", "b02.png", "b2.png", "b10.PNG", "².png"]
    expected = [pixels(names.index(name)) for name in order] * 2
    scandir = os.scandir
    for backwards in (False, True):  # whatever order the file system lists them in

        def listing(path, backwards=backwards):
            with scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name, reverse=backwards)
            return contextlib.nullcontext(entries)

        monkeypatch.setattr("classroomkd.data.class_folders.os.scandir", listing)
        train, _ = load(tmp_path)
        assert train.classes == ["x", "y"]
        np.testing.assert_array_equal(train.images, expected)


def test_more_files_than_one_chunk_of_a_thread(tmp_path):
    made = make_tree(tmp_path, count=150)
    train, test = load(tmp_path)
    expected = [made[f"train/{name}/{i}.png"] for name in ("cat", "dog") for i in range(150)]
    np.testing.assert_array_equal(train.images, expected)
    assert len(test) == 300


def test_one_folder_is_split_by_class_and_seed(tmp_path):
    counts = {"a": 10, "b": 5, "c": 2}
    for name, count in counts.items():
        for i in range(count):
            write(
                tmp_path / name / f"{i}.png", np.full((8, 8, 3), 20 * ord(name) % 200 + i, np.uint8)
            )

    def contents(image_set):
        return list(
            zip(image_set.targets.tolist(), image_set.images[:, 0, 0, 0].tolist(), strict=True)
        )

    train, test = load(tmp_path, seed=1, test_share=0.3)
    assert np.bincount(test.targets).tolist() == [3, 2, 1]  # 3, 1.5, and 0.6 but at least 1
    assert np.bincount(train.targets).tolist() == [7, 3, 1]
    everything = [(t, 20 * ord(n) % 200 + i) for t, n in enumerate("abc") for i in range(counts[n])]
    assert sorted(contents(train) + contents(test)) == sorted(everything)
    assert contents(load(tmp_path, seed=1, test_share=0.3)[1]) == contents(test)
    splits = {str(contents(load(tmp_path, seed=seed, test_share=0.3)[1])) for seed in range(8)}
    assert len(splits) > 4
    assert np.bincount(load(tmp_path, test_share=0.99)[0].targets).tolist() == [1, 1, 1]
    assert np.bincount(load(tmp_path, test_share=0.01)[1].targets).tolist() == [1, 1, 1]


def test_missing_folder_and_file(tmp_path):
    assert error_of(tmp_path / "nowhere") == f"no such folder: {tmp_path / 'nowhere'}"
    (tmp_path / "file.zip").write_bytes(b"PK")
    assert f"{tmp_path / 'file.zip'} is a file" in error_of(tmp_path / "file.zip")


def test_folders_without_classes_or_images(tmp_path):
    message = (
        f"no class folders in {tmp_path}: put the images of each class in a separate "
        f"folder, such as {tmp_path.name}/cat/ and {tmp_path.name}/dog/"
    )
    assert error_of(tmp_path) == message
    write(tmp_path / "0.jpeg", pixels(0))
    assert error_of(tmp_path) == message
    make_tree(tmp_path, parts=["all"])
    (tmp_path / "all" / "empty").mkdir()
    assert f"images in the class folder {tmp_path / 'all' / 'empty'}" in error_of(tmp_path / "all")


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "valid")])
def test_classes_that_are_split_into_parts_are_not_pooled(tmp_path, names):
    """Or images of the test part would be trained on."""
    train, held_out = names
    for part in names:
        make_tree(tmp_path / "sets", (f"A/{part}", f"B/{part}"))
        make_tree(tmp_path / "classes", (f"cat/{part}", f"dog/{part}"), classes=("",))
    for root, first in (("sets", "A"), ("classes", "cat")):
        root = tmp_path / root
        assert error_of(root) == (
            f"the class folder {root / first} holds {train}/ and {held_out}/, named like parts of "
            f"a data set: give {root / first} if it is one, or put the parts above the classes, as "
            f"{root / train / first} and {root / held_out / first}"
        )
        assert str(root / first) in refusal(list_source, root)
    assert len(load(tmp_path / "sets" / "A")[0]) == 6
    # One name alone may be any sub-folder's.
    make_tree(tmp_path / "one", ("cat/test", "dog/train"), classes=("",))
    assert load(tmp_path / "one")[0].classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("parts", "classes", "message"),
    [
        (("train", "val"), ("cat",), "only one class, 'cat', in {0}/train"),
        (("val",), ("cat",), "only one class, 'cat', in {0}/val"),
        (("train", "dev"), ("cat", "dog"), "{0} has train/ but neither test/ nor val/"),
        (
            ("train", "Training", "val"),
            ("cat", "dog"),
            "{0}/Training and {0}/train are both named like the train part",
        ),
        *(
            (
                (name, "photos"),
                ("cat", "dog"),
                f"{{0}}/{name} is named like a part of a data set, but there is no train/ next to "
                f"it: name the folder of the training images {{0}}/train (or rename {name}/ if it",
            )
            for name in ("test", "Valid", "TESTING")
        ),
    ],
)
def test_parts_that_will_not_do(tmp_path, parts, classes, message):
    make_tree(tmp_path, parts, classes)
    path = tmp_path / "val" if parts == ("val",) else tmp_path
    assert message.format(tmp_path) in error_of(path)


def torchvisions(folder):
    """Torchvision's files and classes of the same folder."""
    found = import_torchvision("datasets").ImageFolder(folder)
    files, targets = zip(*found.samples, strict=True)
    return [str(file) for file in files], list(targets), found.classes


def test_folders_below_a_class_folder_are_torchvisions(tmp_path):
    """In its order too, where no number has fewer digits than another."""
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            for below, more in ((".", count), ("more", 10 * count), ("more/deep/er", 3)):
                for i in range(more):
                    write(tmp_path / part / name / below / f"{i:02}.png", pixels(i))
    outside = tmp_path / "elsewhere" / "linked"
    write(outside / "z.jpeg", pixels(0))
    (tmp_path / "train" / "cat" / "link").symlink_to(outside)
    root = tmp_path / "set"
    root.mkdir()
    for part in ("train", "test"):
        (tmp_path / part).rename(root / part)
    for part, image_set in zip(("train", "test"), list_source(root), strict=True):
        files, targets, classes = torchvisions(root / part)
        assert [str(file) for file in image_set.files] == files
        assert image_set.targets.tolist() == targets
        assert image_set.classes == classes
    assert len(load(root)[0]) == 2 * (4 + 40 + 3) + 1


def test_tiny_imagenets_folders(tmp_path, capfd):
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            for i in range(3):
                write(tmp_path / part / name / "images" / f"{name}_{i}.JPEG", pixels(i))
            (tmp_path / part / name / f"{name}_boxes.txt").touch()
    parts = list_parts(tmp_path)
    for part, image_set in (("train", parts.train), ("val", parts.test)):
        assert [str(file) for file in image_set.files] == torchvisions(tmp_path / part)[0]
    assert "(not PNG, JPEG or WebP): 4 " in capfd.readouterr().err


def test_links_that_lead_round_in_circles(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat")
    (tmp_path / "val" / "dog" / "up").mkdir()
    (tmp_path / "val" / "dog" / "up" / "up").symlink_to(tmp_path / "val" / "dog")
    assert [len(part) for part in list_source(tmp_path)] == [6, 6]


def test_a_link_to_itself_is_an_ignored_file(tmp_path, capfd):
    make_tree(tmp_path)
    for folder in ("train/cat", "train", "."):
        (tmp_path / folder / "self").symlink_to("self")
    assert [len(part) for part in list_source(tmp_path)] == [6, 6]
    assert "files ignored (not PNG, JPEG or WebP): 2 " in capfd.readouterr().err
    image = tmp_path / "val" / "dog" / "self.png"
    image.symlink_to("self.png")
    assert error_of(tmp_path).startswith(f"{image} is not a file, or a broken link")


def test_a_set_without_sub_folders_has_the_digest_that_it_had(tmp_path):
    """By which mentors are kept: of the targets, and of each file's SHA-256, in natural order."""
    made = make_tree(tmp_path, parts=("train", "test"), count=11)
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(11)]
    assert len(made) == 44
    files = b"".join(
        hashlib.sha256((tmp_path / "train" / name).read_bytes()).digest() for name in names
    )
    targets = np.repeat(np.arange(2, dtype="<i8"), 11).tobytes()
    expected = hashlib.sha256(targets + hashlib.sha256(files).hexdigest().encode()).hexdigest()
    assert list_source(tmp_path)[0].digest() == expected


def test_val_beside_test_is_the_validation_part(tmp_path):
    made = make_tree(tmp_path, ("Training", "VALID", "test"))
    for parts in (list_parts(tmp_path), load_parts(tmp_path, image_size=8)):
        assert parts.folders == {"train": "Training/", "validation": "VALID/", "test": "test/"}
        for folder, part in (
            ("Training", parts.train),
            ("VALID", parts.validation),
            ("test", parts.test),
        ):
            expected = [made[f"{folder}/{name}/{i}.png"] for name in part.classes for i in range(3)]
            np.testing.assert_array_equal([part[i][0] for i in range(len(part))], expected)
    assert not is_split_by_seed(tmp_path)
    write(tmp_path / "VALID" / "cow" / "0.png", pixels(0))
    assert f"'cow' is in {tmp_path / 'VALID'} but not in {tmp_path / 'Training'}" in error_of(
        tmp_path
    )


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("held_out", ["val", "Valid", "validation", "TEST", "testing"])
def test_usual_names_of_parts(tmp_path, train, held_out):
    make_tree(tmp_path, (train, held_out))
    parts = list_parts(tmp_path)
    assert parts.folders == {"train": f"{train}/", "test": f"{held_out}/"}
    assert [part is None or len(part) for part in parts[:3]] == [6, 6, True]


def test_images_and_folders_that_are_not_used_are_counted(tmp_path, capfd):
    make_tree(tmp_path, ("train", "val", "extra", "__MACOSX"))
    write(tmp_path / "train" / "loose.png", pixels(0))
    load(tmp_path)
    folders, images = capfd.readouterr().err.splitlines()
    assert folders.endswith(
        f"ignored (not training, validation or test): 1 (such as {tmp_path / 'extra'})"
    )
    assert images.endswith(
        f"ignored (in no class folder): 1 (such as {tmp_path / 'train' / 'loose.png'})"
    )


@pytest.mark.parametrize("below", [".", "images"])  # images/ is Tiny ImageNet's
def test_a_test_part_without_labels_is_to_be_moved_away(tmp_path, below):
    make_tree(tmp_path, ("train", "val"))
    write(tmp_path / "test" / below / "0.png", pixels(0))
    message = error_of(tmp_path)
    assert str(tmp_path / "test") in message
    advice = ", or, if its images have no labels, move test/ away"
    assert message.endswith(f"{advice} (then val/ is used)")
    (tmp_path / "test").rename(tmp_path / "unlabelled")
    assert list_parts(tmp_path).folders["test"] == "val/"
    (tmp_path / "unlabelled").rename(tmp_path / "test")
    (tmp_path / "val").rename(tmp_path / "later")
    assert error_of(tmp_path).endswith(advice)


def test_classes_that_differ(tmp_path):
    make_tree(tmp_path)
    write(tmp_path / "val" / "cow" / "0.png", pixels(0))
    assert f"'cow' is in {tmp_path / 'val'} but not in {tmp_path / 'train'}" in error_of(tmp_path)
    make_tree(tmp_path, parts=["train"], classes=["cow", "emu"])
    assert f"'emu' is in {tmp_path / 'train'} but not in {tmp_path / 'val'}" in error_of(tmp_path)


def test_class_too_small_to_split(tmp_path):
    make_tree(tmp_path, parts=["all"])
    write(tmp_path / "all" / "rare" / "0.png", pixels(0))
    assert f"'rare' in {tmp_path / 'all'} has one image" in error_of(tmp_path / "all")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("damage", ["half", "few", "empty", "text"])
def test_damaged_image_is_named(tmp_path, kind, damage):
    make_tree(tmp_path)
    bad = tmp_path / "val" / "dog" / f"1.{kind}"
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, 64, 64)).save(buffer, kind)
    data = buffer.getvalue()
    content = {"half": data[: len(data) // 2], "few": data[:20], "empty": b"", "text": b"no image"}
    bad.write_bytes(content[damage])
    message = error_of(tmp_path)
    assert message.startswith(str(bad))
    assert "more" not in message


def test_files_ignored_are_counted(tmp_path, capfd):
    make_tree(tmp_path)
    load(tmp_path)
    assert capfd.readouterr().err == ""
    for name in ("train/cat/a.gif", "train/dog/b.bmp", "val/cat/c.tiff"):
        write(tmp_path / name, pixels(0))
    (tmp_path / "train" / "cat" / ".hidden.gif").touch()
    load(tmp_path)
    (line,) = capfd.readouterr().err.splitlines()
    assert "(not PNG, JPEG or WebP): 3 " in line
    assert str(tmp_path / "train" / "cat" / "a.gif") in line


def test_broken_link_is_named(tmp_path):
    make_tree(tmp_path)
    link = tmp_path / "train" / "dog" / "9.png"
    link.symlink_to(tmp_path / "gone.png")
    assert error_of(tmp_path).startswith(f"{link} is not a file, or a broken link")
    write(tmp_path / "gone.png", pixels(9))
    np.testing.assert_array_equal(load(tmp_path)[0].images[-1], pixels(9))


def test_image_of_too_many_pixels_is_named(tmp_path, monkeypatch, recwarn):
    make_tree(tmp_path)
    huge = tmp_path / "val" / "cat" / "huge.png"
    write(huge, pixels(0, 30, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert error_of(tmp_path).startswith(f"{huge} cannot be read (Image size (1200 pixels)")
    assert not recwarn.list


def test_which_data_is_split_by_seed(tmp_path):
    make_tree(tmp_path)
    assert not is_split_by_seed(tmp_path)
    assert is_split_by_seed(str(tmp_path / "val"))
    make_cifar(tmp_path / "cifar", "cifar10")
    assert not is_split_by_seed(tmp_path / "cifar")


def test_several_damaged_images_are_counted(tmp_path):
    made = make_tree(tmp_path, count=100)
    for name in ("train/dog/7.png", "train/dog/90.png", "val/cat/3.png"):
        assert name in made
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    message = error_of(tmp_path)
    assert message.startswith(str(tmp_path / "train" / "dog" / "7.png"))
    assert "; 2 more cannot be read either" in message


def test_bad_arguments(tmp_path):
    make_tree(tmp_path)
    assert "got 0" in error_of(tmp_path, image_size=0)
    assert "got 1025" in error_of(tmp_path, image_size=1025)
    for share in (0, 1, -0.1, 1.5):
        assert f"got {share}" in error_of(tmp_path, test_share=share)
    assert "'imagenet': only cifar10 and cifar100" in error_of(tmp_path, download="imagenet")


# ---------------------------------------------------------------- decoding


def decoded(tmp_path, image, size=8, name="0.png", **options):
    for part in ("train", "val"):
        write(tmp_path / part / "a" / name, image, **options)
        write(tmp_path / part / "b" / "0.png", pixels(0))
    return load(tmp_path, image_size=size)[0].images[0]


@pytest.mark.parametrize("name", ["0.jpg", "0.JPEG", "0.webp", "0.PNG"])
def test_formats(tmp_path, name):
    smooth = np.linspace(0, 255, 16, dtype=np.uint8)[:, None, None].repeat(16, 1).repeat(3, 2)
    result = decoded(tmp_path, smooth, 16, name)
    assert np.abs(result.astype(int) - smooth).max() <= (0 if name.endswith("PNG") else 16)


def test_grey_images(tmp_path):
    grey = pixels(0)[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(decoded(tmp_path, grey), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decoded(tmp_path, deep), expected)
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(decoded(tmp_path, bits))) == {0, 255}


def test_palette_images(tmp_path):
    palette = Image.fromarray(pixels(0)).quantize(16)
    np.testing.assert_array_equal(decoded(tmp_path, palette), np.asarray(palette.convert("RGB")))
    flat = Image.new("P", (8, 8), 1)
    flat.putpalette([10, 20, 30, 40, 50, 60])
    assert (decoded(tmp_path, flat) == [40, 50, 60]).all()
    assert (decoded(tmp_path, flat, transparency=1) == 255).all()


@pytest.mark.parametrize("name", ["0.png", "0.webp"])
def test_transparent_pixels_lie_on_white(tmp_path, name):
    colour = np.zeros((8, 8, 4), np.uint8)
    colour[:, :] = (200, 100, 0, 255)
    colour[:4, :, 3] = 0
    colour[7, :, 3] = 51  # a fifth
    result = decoded(tmp_path, colour, name=name, lossless=True, exact=True)
    assert (result[:4] == 255).all()
    assert (result[4:7] == [200, 100, 0]).all()
    assert (result[7] == [244, 224, 204]).all()
    if name == "0.png":
        grey = Image.merge("LA", [Image.fromarray(colour[..., i]) for i in (0, 3)])
        result = decoded(tmp_path, grey)
        assert (result[:4] == 255).all()
        assert (result[4:7] == 200).all()
        assert (result[7] == 244).all()


def test_photographs_are_turned_upright(tmp_path):
    upright = pixels(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90° clockwise for display
    lying = np.rot90(upright)  # anticlockwise
    np.testing.assert_array_equal(decoded(tmp_path, lying, exif=exif), upright)


def test_other_shapes_give_their_centred_square(tmp_path):
    for shape in ((8, 24), (24, 8)):
        image = np.zeros((*shape, 3), np.uint8)
        middle = tuple(slice(8, 16) if side == 24 else slice(None) for side in shape)
        image[middle] = pixels(1)
        np.testing.assert_array_equal(decoded(tmp_path, image), pixels(1))


def test_shrinking_is_antialiased_and_growing_keeps_flat_colours(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(decoded(tmp_path, board).astype(int) - 127.5).max() <= 8
    big = decoded(tmp_path, pixels(0, 32, 32), 8)
    expected = Image.fromarray(pixels(0, 32, 32)).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(big, np.asarray(expected))
    assert (decoded(tmp_path, np.full((1, 3, 3), 77, np.uint8)) == 77).all()


# ---------------------------------------------------------------- CIFAR


class NewNumpyPickler(Python2Pickler):
    numpy_module = "numpy._core.multiarray"


@pytest.mark.parametrize("pickler", [Python2Pickler, NewNumpyPickler])
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar(tmp_path, kind, pickler):
    folder, train_images, test_images = make_cifar(tmp_path, kind, pickler)
    for path in (folder, tmp_path):
        train, test = load(path, image_size=32)
        np.testing.assert_array_equal(train.images, train_images)
        np.testing.assert_array_equal(test.images, test_images)
        count = 10 if kind == "cifar10" else 100
        assert train.classes == test.classes == [f"class {i:02}" for i in range(count)]
        files = len(train_images) // 5
        assert train.targets.tolist() == [
            (7 * n + i) % count for n in range(files) for i in range(5)
        ]
        assert test.targets.tolist() == [(7 * files + i) % count for i in range(5)]
        assert train.targets.dtype == np.int64
        assert train.images.flags.c_contiguous
    small, _ = load(tmp_path, image_size=16)
    expected = Image.fromarray(train_images[0]).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(small.images[0], np.asarray(expected))


def test_cifar_pickled_by_python_3(tmp_path):
    folder, train_images, _ = make_cifar(tmp_path, "cifar100")
    with (folder / "train").open("wb") as file:
        planes = train_images.transpose(0, 3, 1, 2).reshape(5, 3072)
        pickle.dump({"data": planes, "fine_labels": [1, 2, 3, 4, 5]}, file, protocol=4)
    np.testing.assert_array_equal(load(tmp_path, image_size=32)[0].images, train_images)


def test_both_cifars_in_one_folder(tmp_path):
    make_cifar(tmp_path, "cifar10")
    make_cifar(tmp_path, "cifar100")
    message = error_of(tmp_path)
    assert "cifar-10-batches-py and" in message
    assert "name one of them" in message
    assert len(load(tmp_path, download="cifar100")[0].classes) == 100


def test_pickle_that_runs_code_is_refused(tmp_path):
    folder, *_ = make_cifar(tmp_path, "cifar100")

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    for file in ("meta", "train", "test"):
        original = (folder / file).read_bytes()
        (folder / file).write_bytes(pickle.dumps({"data": Evil()}))
        message = error_of(tmp_path)
        assert f"{folder / file} is damaged or not a CIFAR file (it asks for" in message
        assert "system" in message
        (folder / file).write_bytes(original)
    assert not (tmp_path / "owned").exists()
    load(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Ran out of input"),
        (b"\x80\x02}q\x00(U\x04data", "Ran out of input"),
        (b"text", "is damaged or not a CIFAR file"),
        (pickle.dumps([1, 2], 2), "a list instead of a dictionary"),
        (pickle.dumps({"data": 3}, 2), "no uint8 matrix 'data'"),
        (pickle.dumps({"data": np.zeros((5, 3072))}, 4), "no uint8 matrix 'data'"),
        (pickle.dumps({"data": np.zeros((5, 99), "u1")}, 4), "99 bytes instead of 3072"),
        (
            pickle.dumps({"data": np.zeros((5, 3072), "u1"), "fine_labels": [1] * 4}, 4),
            "no list 'fine_labels' of 5 labels",
        ),
        (
            pickle.dumps({"data": np.zeros((5, 3072), "u1"), "fine_labels": [1] * 4 + [100]}, 4),
            "a label outside 0..99",
        ),
    ],
)
def test_damaged_cifar_batch_is_named(tmp_path, content, reason):
    folder, *_ = make_cifar(tmp_path, "cifar100")
    (folder / "test").write_bytes(content)
    message = error_of(tmp_path)
    assert message.startswith(f"{folder / 'test'} is damaged or not a CIFAR file (")
    assert reason in message


def test_truncated_and_missing_cifar_files(tmp_path):
    folder, *_ = make_cifar(tmp_path, "cifar10")
    batch = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(batch[: len(batch) // 2])
    assert error_of(folder).startswith(f"{folder / 'data_batch_3'} is damaged")
    (folder / "data_batch_3").unlink()
    assert "not a complete CIFAR-10 folder: data_batch_3 is missing" in error_of(folder)
    (folder / "data_batch_3").write_bytes(batch)
    python2(folder / "batches.meta", {"label_names": "abc"})
    assert f"{folder / 'batches.meta'} is damaged" in error_of(folder)


@pytest.fixture
def torchvision_stub(monkeypatch):
    """Stands in for torchvision's data sets; what it is asked is kept, and what it does is set."""
    stub = types.SimpleNamespace(calls=[], act=None)

    def data_set(kind):
        def make(root, train, download):
            assert download
            stub.calls.append((kind, root))
            stub.act()

        return make

    stub.CIFAR10, stub.CIFAR100 = data_set("CIFAR10"), data_set("CIFAR100")
    monkeypatch.setattr("classroomkd.torchvision.import_torchvision", lambda name: stub)
    return stub


def test_download_where_the_files_are_not(tmp_path, torchvision_stub):
    root = tmp_path / "new"
    torchvision_stub.act = lambda: make_cifar(root, "cifar100")
    assert len(load(root, download="cifar100")[0].classes) == 100
    assert torchvision_stub.calls == [("CIFAR100", str(root))]
    load(root, download="cifar100")
    load(root / "cifar-100-python", download="cifar100")
    assert len(torchvision_stub.calls) == 1
    (root / "cifar-100-python" / "test").unlink()  # an unpacking that was cut short
    load(root, download="cifar100")
    assert len(torchvision_stub.calls) == 2


@pytest.mark.parametrize(
    "failure",
    [urllib.error.URLError("no\nname"), RuntimeError("corrupt"), ImportError("no torchvision")],
)
def test_download_without_a_network(tmp_path, torchvision_stub, failure):
    def fail():
        raise failure

    torchvision_stub.act = fail
    message = error_of(tmp_path, download="cifar10")
    assert f"could not download CIFAR-10 into {tmp_path} (" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert str(tmp_path / "cifar-10-batches-py") in message


# ---------------------------------------------------------------- digits


def test_digits():
    train, test = digits()
    assert (len(train), len(test)) == (1198, 599)
    assert train.classes == test.classes == list("0123456789")
    for image_set in (train, test):
        assert image_set.images.shape == (len(image_set), 16, 16, 3)
        assert image_set.images.dtype == np.uint8
        assert image_set.targets.dtype == np.int64
        assert (image_set.images == image_set.images[..., :1]).all()
    total, held_out = np.bincount(np.r_[train.targets, test.targets]), np.bincount(test.targets)
    assert np.abs(held_out - total / 3).max() <= 0.5
    again, other = digits()[1], digits(seed=1)[1]
    np.testing.assert_array_equal(again.images, test.images)
    assert not np.array_equal(other.images, test.images)
    tenth = np.bincount(digits(test_share=0.1)[1].targets)
    assert np.abs(tenth - total / 10).max() <= 0.5


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    originals = load_digits()
    expected = [
        (Image.fromarray(grey).resize((16, 16), Image.Resampling.LANCZOS).tobytes(), label)
        for grey, label in zip(
            (originals.images * 255 / 16 + 0.5).astype(np.uint8), originals.target, strict=True
        )
    ]
    found = [
        (image[..., 0].tobytes(), target)
        for part in digits(seed=3)
        for image, target in zip(part.images, part.targets, strict=True)
    ]
    assert sorted(found) == sorted(expected)


# ---------------------------------------------------------------- arrays and data sets


def test_arrays_are_a_source():
    images = np.stack([pixels(i) for i in range(4)])
    image_set = ImageSet(images, [1, 0, 1, 1], ("a", "b"))
    assert image_set.images is images
    assert image_set.targets.dtype == np.int64
    assert image_set.classes == ["a", "b"]
    image, target = image_set[2]
    np.testing.assert_array_equal(image, images[2])
    assert (target, type(target)) == (1, int)
    assert ImageSet(images, np.array([1, 0, 1, 1], np.uint8), ["a", "b"]).targets.dtype == np.int64


def test_arrays_that_are_no_images():
    images, targets, classes = np.zeros((2, 4, 5, 3), np.uint8), np.array([0, 1]), ["a", "b"]
    for bad, message in (
        (images.astype(np.float32), "the images must be a uint8 NumPy array, got float32"),
        (images.tolist(), "the images must be a uint8 NumPy array, got list"),
        (images[0], "the images must be [N, H, W, 3], got [4, 5, 3]"),
        (images.transpose(0, 3, 1, 2), "the images must be [N, H, W, 3], got [2, 3, 4, 5]"),
        (images[:, :0], "the images must be [N, H, W, 3], got [2, 0, 5, 3]"),
        (images[:1], "the targets must be [1], one per image, got [2]"),
    ):
        assert refusal(ImageSet, bad, targets, classes) == message
    for bad, message in (
        ([0.0, 1.0], "the targets must be whole numbers, got float64"),
        ([True, False], "the targets must be whole numbers, got bool"),
        ([[0], [1]], "the targets must be [2], one per image, got [2, 1]"),
        ([0, 2], "target 1 is 2, but there are 2 classes"),
        ([-1, 0], "target 0 is -1, but there are 2 classes"),
    ):
        assert refusal(ImageSet, images, bad, classes) == message
        assert refusal(ImageFiles, ["a.png", "b.png"], bad, classes) == message
    assert refusal(ImageSet, images, targets, [0, 1]) == "the classes must be names, got 0"
    message = refusal(ImageSet, images, targets, ["a", "b", "a"])
    assert message == "the class 'a' occurs more than once"


class Samples(list):
    """A map-style data set."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if isinstance(sample, Exception):
            raise sample
        return sample


@pytest.mark.parametrize("shape", [(8, 6), (3, 5), (5, 3), (3, 3)])
def test_map_style_data_sets(shape):
    expected = np.stack([pixels(i, *shape) for i in range(6)])
    samples = Samples(
        [
            (Image.fromarray(expected[0]), 2),
            (expected[1], np.int32(0)),
            (torch.from_numpy(expected[2]).permute(2, 0, 1), torch.tensor(1)),
            (torch.from_numpy(expected[3]).permute(2, 0, 1).contiguous(), 2),
            (Image.fromarray(expected[4]).convert("RGBA"), 0),
            (Image.fromarray(expected[5][..., 0]), 1),
        ]
    )
    if 3 not in shape:  # or nobody could tell
        samples[1] = (expected[1].transpose(2, 0, 1), np.int32(0))
        samples[3] = (torch.from_numpy(expected[3]), 2)
    expected[5] = expected[5][..., :1]
    image_set = from_dataset(samples)
    np.testing.assert_array_equal(image_set.images, expected)
    assert image_set.targets.tolist() == [2, 0, 1, 2, 0, 1]
    assert image_set.classes == ["0", "1", "2"]
    samples.classes = ("x", "y", "z")
    assert from_dataset(samples).classes == ["x", "y", "z"]
    assert from_dataset(samples, ["p", "q", "r"]).classes == ["p", "q", "r"]
    assert "but there are 2 classes" in refusal(from_dataset, samples, ["p", "q"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((np.zeros((8, 9, 3), np.uint8), 0), "image 2 of the data set is [8, 9, 3], but image 0"),
        ((torch.zeros(3, 8, 8), 0), "its image is float32, not uint8 (remove transforms"),
        ((np.zeros((8, 8), np.uint8), 0), "its image is [8, 8], neither"),
        ((np.zeros((8, 8, 4), np.uint8), 0), "its image is [8, 8, 4], neither"),
        ((pixels(0), 0.5), "'float' object cannot be interpreted as an integer"),
        ((pixels(0), "cat"), "'str' object cannot be interpreted as an integer"),
        (pixels(0), "it is not a pair (image, class index)"),
        (OSError("image file is truncated"), "image file is truncated"),
    ],
)
def test_sample_that_is_off_is_named(bad, message):
    samples = Samples([(pixels(0), 0), (pixels(1), 1), bad])
    error = refusal(from_dataset, samples)
    assert message in error
    assert error.startswith(("sample 2 of the data set cannot be used: ", "image 2 of"))
    assert refusal(from_dataset, Samples()) == "the data set is empty"


# ---------------------------------------------------------------- files that are decoded on use


def test_listed_files_are_those_that_are_loaded(tmp_path, capfd):
    make_tree(tmp_path, count=12)
    (tmp_path / "train" / "cat" / "a.gif").touch()
    for path, options in ((tmp_path, {}), (tmp_path / "train", {"seed": 5, "test_share": 0.3})):
        assert "files ignored" in capfd.readouterr().err or path == tmp_path
        for listed, loaded in zip(list_source(path, **options), load(path, **options), strict=True):
            assert listed.classes == loaded.classes
            np.testing.assert_array_equal(listed.targets, loaded.targets)
            assert len(listed) == len(loaded)
            for i in range(len(listed)):
                np.testing.assert_array_equal(listed[i][0], loaded.images[i])
                assert listed[i][1] == loaded.targets[i]


def test_listed_files_keep_their_sizes_and_are_read_when_asked_for(tmp_path):
    make_tree(tmp_path)
    upright = pixels(7, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "train" / "cat" / "0.png", np.rot90(upright), exif=exif)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"damaged")
    train, _ = list_source(tmp_path)
    np.testing.assert_array_equal(train[0][0], upright)
    assert read_size(train.files[0]) == (20, 30)
    assert read_size(train.files[2]) == (8, 8)
    message = refusal(train.__getitem__, 1)
    assert message == f"{tmp_path / 'train' / 'cat' / '1.png'} is not a PNG, JPEG or WebP image"
    both = join(*list_source(tmp_path))
    assert both.files == train.files + list_source(tmp_path)[1].files
    np.testing.assert_array_equal(both.targets, [0, 0, 0, 1, 1, 1] * 2)


def test_sources_without_files(tmp_path):
    make_cifar(tmp_path / "cifar", "cifar10")
    assert "there are no image files" in refusal(list_source, tmp_path / "cifar")
    assert refusal(list_source, tmp_path / "a") == f"no such folder: {tmp_path / 'a'}"
    assert "must be between 0 and 1" in refusal(list_source, tmp_path, test_share=1)
