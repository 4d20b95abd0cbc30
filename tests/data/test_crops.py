"""Crops of photographs: where they are, and what becomes of their pixels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from classroomkd.data import CentreCrop, ImageFiles, RandomResizedCrop, ResidentLoader, TorchLoader
from classroomkd.data.augmentation import normalisation_table
from classroomkd.errors import UserError
from ffcv_required import requires_ffcv
from loader_cases import MEAN, STD
from slow_augmentation import slow_word

SIDES = st.integers(1, 700)


def slow_box(crop, seed, epoch, index, height, width):
    """In the way of torchvision's RandomResizedCrop, one attempt after another."""
    for attempt in range(10):
        h = slow_word(4 + 2 * attempt, seed, epoch, index)
        g = slow_word(5 + 2 * attempt, seed, epoch, index)
        low, high = crop.area
        area = height * width * (low + (high - low) * (h // 2**16 / 2**16))
        low, high = map(math.log, crop.aspect)
        aspect = math.exp(low + (high - low) * (h % 2**16 / 2**16))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            row = g // 2**16 * (height - h + 1) // 2**16
            return row, g % 2**16 * (width - w + 1) // 2**16, h, w
    if width / height < crop.aspect[0]:
        h, w = min(height, round(width / crop.aspect[0])), width
    elif width / height > crop.aspect[1]:
        h, w = height, min(width, round(height * crop.aspect[1]))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=8),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    area=st.sampled_from([(0.08, 1.0), (0.9, 1.0), (1.0, 1.0)]),
    aspect=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.2, 5.0)]),
)
def test_random_boxes_match_the_slow_ones(sizes, seed, epoch, area, aspect):
    crop = RandomResizedCrop(224, area=area, aspect=aspect)
    heights, widths = np.array(sizes).T
    indices = np.arange(len(sizes)) * 1000
    boxes = crop.boxes(seed, epoch, indices, heights, widths)
    expected = [
        slow_box(crop, seed, epoch, i, h, w)
        for i, (h, w) in zip(indices.tolist(), sizes, strict=True)
    ]
    # A product that lies next to a half may be rounded either way.
    assert np.abs(boxes - expected).max() <= 1
    assert (boxes == expected).all(axis=1).mean() > 0.8 or len(sizes) < 5
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= heights).all()
    assert (boxes[:, 1] + boxes[:, 3] <= widths).all()


def test_random_boxes_are_spread_as_they_should_be():
    """Of 375×500 photographs: areas uniform in 8 to 100 %, where they fit; places uniform."""
    n = 20_000
    heights, widths = np.full(n, 375), np.full(n, 500)
    boxes = RandomResizedCrop(224).boxes(0, 1, np.arange(n), heights, widths)
    row, column, height, width = boxes.T
    area, aspect = height * width / (375 * 500), width / height
    small = area < 0.5
    assert abs(np.mean(area[small]) - (0.08 + 0.5) / 2) < 0.01
    assert abs(np.mean(np.log(aspect[small]))) < 0.01
    assert 3 / 4 - 0.02 <= aspect.min() <= aspect.max() <= 4 / 3 + 0.02
    assert abs(np.mean(row[small] / (375 - height[small])) - 0.5) < 0.01
    assert abs(np.mean(column[small] / (500 - width[small])) - 0.5) < 0.01
    assert (boxes != RandomResizedCrop(224).boxes(0, 2, np.arange(n), heights, widths)).any()


def test_central_boxes():
    """The centre 224 of what was brought to a shorter side of 256."""
    boxes = CentreCrop(224).boxes(
        0, 0, np.arange(3), np.array([256, 512, 1]), np.array([256, 640, 9])
    )
    assert boxes.tolist() == [[16, 16, 224, 224], [32, 96, 448, 448], [0, 4, 1, 1]]
    whole = CentreCrop(64, share=1.0).boxes(*(0, 0, np.arange(1), np.array([30]), np.array([50])))
    assert whole.tolist() == [[0, 10, 30, 30]]


def test_crops_out_of_range():
    for make, message in [
        (lambda: RandomResizedCrop(0), r"size must be within 1\.\.1024 pixels, got 0"),
        (lambda: CentreCrop(1025), r"size must be within 1\.\.1024 pixels, got 1025"),
        (lambda: RandomResizedCrop(8, area=(0.5, 0.1)), r"area .* got \(0\.5, 0\.1\)"),
        (lambda: RandomResizedCrop(8, area=(0.5, 1.5)), r"area .* got \(0\.5, 1\.5\)"),
        (lambda: RandomResizedCrop(8, aspect=(0, 1)), r"aspect .* got \(0, 1\)"),
        (lambda: CentreCrop(8, share=0), "share must be above 0 and at most 1, got 0"),
    ]:
        with pytest.raises(UserError, match=message):
            make()


# ---------------------------------------------------------------- in the loaders


@pytest.fixture
def photographs(tmp_path):
    """Twelve smooth pictures of different sizes, as files."""
    generator = np.random.default_rng(0)
    files = []
    for i in range(12):
        height, width = generator.integers(40, 160, 2)
        coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(files[-1])
    return ImageFiles(files, np.arange(12) % 3, list("abc"))


OPTIONS = {"mean": MEAN, "std": STD, "shuffle": True, "drop_last": False, "seed": 4}


def area_mean(image, size):
    """The exact mean over each pixel's area, in float64, [size, size, 3]."""
    for axis in range(2):
        n = image.shape[axis]
        edges = np.arange(size + 1) * n / size
        weights = np.clip(
            np.minimum(edges[1:, None], np.arange(n) + 1)
            - np.maximum(edges[:-1, None], np.arange(n)),
            0,
            None,
        )
        image = np.moveaxis(np.tensordot(weights * size / n, image, (1, axis)), 0, axis)
    return image


def pictures(loader):
    """An epoch as grey levels 0..255, [N, H, W, 3], in the set's order, and its targets."""
    images, targets, indices = (torch.cat(parts) for parts in zip(*loader, strict=True))
    levels = (images.double().numpy().transpose(0, 2, 3, 1) * STD + MEAN) * 255
    order = indices.argsort()
    return levels[order], targets[order]


def expected_crop(crop, image, epoch, index):
    """The pixels of a sample's crop in its own size, and whether they are to be flipped."""
    places = (np.array([n]) for n in (index, *image.shape[:2]))
    ((row, column, height, width),) = crop.boxes(4, epoch, *places)
    cut = image[row : row + height, column : column + width]
    flip = crop.after is not None and crop.after.flip and slow_word(1, 4, epoch, index) % 2
    return np.ascontiguousarray(cut), bool(flip)


def packed(photographs, path, **how):
    """The photographs as a .beton file."""
    from classroomkd.data.ffcv.beton import pack

    return pack(photographs, path, **how)


CROP = RandomResizedCrop(24)


def opened(path, augmentation=CROP, **options):
    """FFCV's loader of batches of 5."""
    from classroomkd.data.ffcv.ffcv_loader import FFCVLoader

    return FFCVLoader(path, 5, augmentation=augmentation, **OPTIONS, **options)


@requires_ffcv
@pytest.mark.parametrize("crop", [RandomResizedCrop(20), CentreCrop(20)])
@pytest.mark.parametrize("workers", [1, 2])
def test_ffcv_crops_photographs(tmp_path, photographs, crop, workers):
    """Raw pixels: the mean over areas to a rounding, for all crops shrink here."""
    packed(photographs, tmp_path / "raw.beton")
    with opened(tmp_path / "raw.beton", crop, workers=workers) as loader:
        for epoch in (0, 3):
            loader.set_epoch(epoch)
            levels, targets = pictures(loader)
            assert targets.tolist() == photographs.targets.tolist()
            compared = 0
            for i, got in enumerate(levels):
                cut, flip = expected_crop(crop, photographs[i][0], epoch, i)
                if min(cut.shape[:2]) >= 20:
                    compared += 1
                    mean = area_mean(cut.astype(float), 20)
                    assert np.abs(got - (mean[:, ::-1] if flip else mean)).max() < 1.01
            assert compared >= 8


@requires_ffcv
def test_ffcv_decodes_jpeg(tmp_path, photographs):
    epochs = []
    for jpeg in (False, True):
        packed(photographs, tmp_path / f"{jpeg}.beton", jpeg=jpeg)
        with opened(tmp_path / f"{jpeg}.beton") as loader:
            epochs.append(pictures(loader)[0])
    difference = np.abs(epochs[0] - epochs[1])
    assert difference.max() > 0  # it is lossy
    assert difference.mean() < 3


@requires_ffcv
def test_photographs_need_a_crop(tmp_path, photographs):
    packed(photographs, tmp_path / "raw.beton")
    with pytest.raises(UserError, match=r"raw\.beton holds photographs of 12 sizes"):
        opened(tmp_path / "raw.beton", None)


@requires_ffcv
def test_a_damaged_jpeg_is_named(tmp_path, photographs):
    path = tmp_path / "jpeg.beton"
    beton = packed(photographs, path, jpeg=True)
    with path.open("rb+") as file:
        file.seek(beton.starts[7])
        file.write(b"\0" * 64)
    message = r"jpeg\.beton: image 7 cannot be read"
    with opened(path) as loader, pytest.raises(UserError, match=message):
        list(loader)


@requires_ffcv
def test_a_jpeg_of_another_size_than_its_entry(tmp_path, photographs):
    """FFCV would give memory that nothing was written to."""
    path = tmp_path / "jpeg.beton"
    beton = packed(photographs, path, jpeg=True)
    smaller = tmp_path / "smaller.jpg"
    Image.fromarray(beton[7][0][:-9, :-5]).save(smaller, quality=20)
    assert smaller.stat().st_size < beton.sizes[7]
    with path.open("rb+") as file:
        file.seek(beton.starts[7])
        file.write(smaller.read_bytes())
    message = r"jpeg\.beton: image 7 is \[\d+, \d+, 3\], its entry says \[\d+, \d+, 3\]"
    with opened(path) as loader, pytest.raises(UserError, match=message):
        list(loader)


@pytest.mark.parametrize("crop", [RandomResizedCrop(20), CentreCrop(20)])
@pytest.mark.parametrize("workers", [0, 1])
def test_torch_crops_photographs(photographs, crop, workers):
    """Pillow's own resizing of the same crop."""
    table = normalisation_table(MEAN, STD)
    with TorchLoader(photographs, 5, augmentation=crop, workers=workers, **OPTIONS) as loader:
        loader.set_epoch(2)
        for images, targets, indices in loader:
            assert targets.tolist() == photographs.targets[indices].tolist()
            for image, i in zip(images, indices.tolist(), strict=True):
                cut, flip = expected_crop(crop, photographs[i][0], 2, i)
                resized = Image.fromarray(cut).resize((20, 20), Image.Resampling.BILINEAR)
                levels = np.asarray(resized)[:, ::-1] if flip else np.asarray(resized)
                finished = np.stack([table[c][levels[..., c]] for c in range(3)])
                np.testing.assert_array_equal(image.numpy(), finished)


def test_the_resident_loader_does_not_crop(tmp_path):
    from loader_cases import random_set

    with pytest.raises(UserError, match="resident loader cannot crop"):
        ResidentLoader(random_set(), 4, augmentation=CentreCrop(4), **OPTIONS)
