"""MixUp and CutMix: against a version written row by row, and against what images show."""

import numpy as np
import pytest
import torch
from scipy.stats import beta

from classroomkd.data import Augmentation, ImageSet, Mixing, ResidentLoader, TorchLoader
from classroomkd.errors import UserError
from loader_cases import ALL, FFCV, MEAN, STD, needs_interpreter, random_set
from slow_augmentation import slow_mix

MIXINGS = [Mixing(4, mixup=0.2), Mixing(4, cutmix=1.0), Mixing(4, mixup=0.8, cutmix=0.5)]
AS_IT_IS = {"mean": (0, 0, 0), "std": (1, 1, 1), "augmentation": None}


@pytest.mark.parametrize(
    ("mixing", "dtype"), [*((m, torch.float32) for m in MIXINGS), (MIXINGS[2], torch.bfloat16)]
)
@pytest.mark.parametrize("kind", ALL)
def test_loaders_match_the_slow_one(make, kind, mixing, dtype):
    """To the bit, in two epochs, which differ, and again from the midst of one."""
    image_set, options = (
        random_set(),
        {"seed": 9, "dtype": dtype, "augmentation": Augmentation(1, True, 2)},
    )
    loader = make(kind, image_set, mixing=mixing, **options)
    plain = make("resident", image_set, **options)
    seen = []
    for epoch in (0, 3):
        for one in (loader, plain):
            one.set_epoch(epoch)
        batches = list(loader)
        for (images, targets, indices), (unmixed, classes, same) in zip(
            batches, plain, strict=True
        ):
            assert indices.tolist() == same.tolist()
            assert images.is_contiguous(memory_format=torch.channels_last)
            expected, labels = slow_mix(mixing, unmixed, classes.tolist(), 9, epoch, same.tolist())
            assert images.dtype == dtype
            assert torch.equal(images, expected.to(dtype))
            assert targets.dtype == torch.float32
            assert torch.equal(targets, labels)
            assert torch.equal(targets.sum(1), torch.ones(len(targets)))
            assert not torch.equal(images, unmixed)
        loader.set_epoch(epoch, first_batch=2)
        for (images, targets, _), (again, labels, _) in zip(batches[2:], loader, strict=True):
            assert torch.equal(images, again)
            assert torch.equal(targets, labels)
        seen.append(batches[0][0])
    assert not torch.equal(*seen)


@needs_interpreter
def test_the_kernels_batches_are_mixed_alike(make):
    options = {"mixing": MIXINGS[2], "dtype": torch.bfloat16}
    loaders = [make(kind, random_set(5), **options) for kind in ("kernel", "resident")]
    for ours, theirs in zip(*loaders, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["resident", "torch-1", *FFCV[:1]])
def test_without_mixing_nothing_is_other(make, kind):
    image_set = random_set()
    for (images, targets, _), (others, _, indices) in zip(
        make(kind, image_set), make(kind, image_set, mixing=MIXINGS[0]), strict=True
    ):
        assert targets.dtype == torch.int64
        assert targets.tolist() == image_set.targets[indices].tolist()
        assert not torch.equal(images, others)


def of_constant_colour(count=60, classes=3, side=16):
    """Class 0 is pure red, 1 green, 2 blue: a pixel's channels are its shares of the classes."""
    targets = np.arange(count) % classes
    images = np.zeros((count, side, side, 3), np.uint8)
    images[np.arange(count), :, :, targets] = 255
    return ImageSet(images, targets, ["red", "green", "blue"])


@pytest.mark.parametrize("kind", ["resident", "torch-1", *FFCV[:1]])
@pytest.mark.parametrize("alphas", [(0.4, 0), (0, 1.0), (1.0, 0.3)])
def test_the_probabilities_are_what_the_image_is_made_of(make, kind, alphas):
    mixup, cutmix = alphas
    loader = make(kind, of_constant_colour(), 7, mixing=Mixing(3, *alphas), **AS_IT_IS)
    whole = 0
    for images, targets, _ in loader:
        composition = images.mean((2, 3))  # of 16 · 16 pixels
        torch.testing.assert_close(composition, targets, rtol=0, atol=1e-6)
        pure = (images == 0) | (images == 1)
        is_cut = pure.flatten(1).all(1)
        one_colour = (images == images[:, :, :1, :1]).flatten(1).all(1)
        assert (is_cut | one_colour).all()
        whole += (is_cut & ~one_colour).sum().item()
    assert (whole == 0) if not cutmix else (whole > (30 if not mixup else 10))


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_shares_are_distributed_as_beta(alpha):
    indices = np.arange(20_000)
    shares, boxes, own = Mixing(2, mixup=alpha).draw(3, 5, indices, 32, 32)
    assert (boxes == 0).all()
    assert (shares == own).all()
    # The Kolmogorov–Smirnov test at 1 %, but for the ends, where rounding makes shares 0 and 1.
    points = np.linspace(1e-6, 1 - 1e-6, 10_001)
    found = np.searchsorted(np.sort(shares), points, side="right") / len(shares)
    assert abs(found - beta.cdf(points, alpha, alpha)).max() < 1.63 / len(shares) ** 0.5
    again, _, _ = Mixing(2, mixup=alpha).draw(3, 6, indices, 32, 32)
    assert abs(np.corrcoef(shares, again)[0, 1]) < 0.03


def test_boxes_are_where_and_as_large_as_they_should_be():
    """Their centres are spread evenly; where they do not meet the border, their area is 1 − λ."""
    side, indices = 512, np.arange(20_000)
    mixing = Mixing(2, cutmix=1.0)
    _, boxes, own = mixing.draw(0, 0, indices, side, side)
    top, left, bottom, right = boxes.T
    assert ((own * side**2) == side**2 - (bottom - top) * (right - left)).all()
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < side).all(1)
    assert inside.mean() == pytest.approx(1 / 6, abs=0.02)  # E (1 − √u)² of an even u
    shares, *_ = Mixing(2, mixup=1.0).draw(0, 0, indices, side, side)
    np.testing.assert_allclose(own[inside], shares[inside], atol=2.1 / side)
    for first, last in ((top, bottom), (left, right)):
        centres = (first[inside] + last[inside]) / 2 / side
        assert centres.mean() == pytest.approx(0.5, abs=0.01)
    _, cuts, _ = Mixing(2, mixup=1.0, cutmix=1.0).draw(0, 0, indices, side, side)
    assert (cuts[:, 2] > 0).mean() == pytest.approx(0.5, abs=0.02)


def test_each_processs_share_is_its_own_batch(make):
    image_set = random_set()
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "augmentation": None}
        loader, plain = (
            make("resident", image_set, 3, mixing=mixing, **options)
            for mixing in (MIXINGS[0], None)
        )
        for (images, targets, indices), (unmixed, classes, _) in zip(loader, plain, strict=True):
            rest = unmixed, classes.tolist(), 0, 0, indices.tolist()
            for actual, expected in zip(
                (images, targets), slow_mix(MIXINGS[0], *rest), strict=True
            ):
                assert torch.equal(actual, expected)


def test_the_smallest_alpha_leaves_nearly_every_image_unmixed():
    shares, _, _ = Mixing(2, mixup=1e-3).draw(3, 5, np.arange(20_000), 32, 32)
    mixed = (shares > 2**-23) & (shares < 1 - 2**-23)
    expected = beta.cdf(1 - 2**-23, 1e-3, 1e-3) - beta.cdf(2**-23, 1e-3, 1e-3)
    assert 0 < expected < 0.02
    assert mixed.mean() == pytest.approx(expected, abs=4 * (expected / len(shares)) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "mixup or cutmix must be above 0; without both, pass no mixing"),
        ({"mixup": -0.1}, "mixup must be 0, or from 0.001 to 1000, got -0.1"),
        ({"mixup": 1000.1}, "mixup must be 0, or from 0.001 to 1000, got 1000.1"),
        ({"mixup": 5e-324}, "mixup must be 0, or from 0.001 to 1000, got 5e-324"),
        (
            {"mixup": 1.0, "cutmix": float("nan")},
            "cutmix must be 0, or from 0.001 to 1000, got nan",
        ),
        ({"num_classes": 0, "mixup": 1.0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message):
    with pytest.raises(UserError) as raised:
        Mixing(**{"num_classes": 3, **arguments})
    assert str(raised.value) == message


@pytest.mark.parametrize("target", [4, -100])
def test_a_target_that_is_no_class(target):
    pairs = [(np.zeros((2, 2, 3), np.uint8), t) for t in (0, target)]
    options = AS_IT_IS | {"shuffle": False, "drop_last": False, "mixing": MIXINGS[0]}
    with (
        TorchLoader(pairs, 2, workers=0, **options) as loader,
        pytest.raises(UserError, match=rf"targets must be within 0\.\.3 to be mixed.*{target}"),
    ):
        list(loader)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_gpu_gives_the_same_bits_and_is_not_waited_for(mixing):
    options = {"mean": MEAN, "std": STD, "shuffle": True, "drop_last": False, "mixing": mixing}
    options["augmentation"] = Augmentation(1, True)
    here, there = (
        ResidentLoader(random_set(), 4, device=device, **options) for device in ("cpu", "cuda")
    )
    list(there)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(here, batches, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b.cpu())
