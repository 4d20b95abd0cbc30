"""The order, the augmentation and the normalisation, against plain Python written separately."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classroomkd.data import Augmentation
from classroomkd.data.augmentation import (
    AUGMENT,
    CUTOUT,
    ORDER,
    SPLIT,
    normalisation_table,
    sample_order,
    words,
)
from classroomkd.errors import UserError
from slow_augmentation import SEEDS, slow_word


def test_words_are_pinned_on_every_platform():
    """Literal values, so that this hash and its slow twin cannot drift together."""
    indices = np.array([0, 1, 49_999, 2**32 - 1])
    pinned = {
        (ORDER, 0, 0): [2878856625, 3749492157, 316637791, 2665924606],
        (AUGMENT, 0, 0): [3233575629, 1587374837, 3496224018, 3901704459],
        (SPLIT, 0, 0): [3229626469, 3132039559, 2488674030, 3539424371],
        (AUGMENT, 2**64 - 1, 239): [2991301763, 2372101683, 194283706, 3452608182],
    }
    for key, values in pinned.items():
        assert words(*key, indices).tolist() == values


@given(seed=SEEDS, epoch=st.integers(0, 2**31), start=st.integers(0, 2**32 - 8))
def test_words_match_unsigned_arithmetic(seed, epoch, start):
    indices = np.arange(start, start + 8)
    for stream in (ORDER, AUGMENT, SPLIT, CUTOUT):
        expected = [slow_word(stream, seed, epoch, index) for index in indices.tolist()]
        assert words(stream, seed, epoch, indices).tolist() == expected


def test_pixels_out_of_range():
    for pixels in (-1, 1025):
        with pytest.raises(UserError, match=f"padding must be within .* got {pixels}"):
            Augmentation(pixels, True)
        with pytest.raises(UserError, match=f"cutout must be within .* got {pixels}"):
            Augmentation(4, True, pixels)


@given(seed=SEEDS, epoch=st.integers(0, 10**6), count=st.integers(0, 300))
def test_order_is_the_sorted_words(seed, epoch, count):
    expected = sorted(range(count), key=lambda index: slow_word(ORDER, seed, epoch, index))
    assert sample_order(seed, epoch, count).tolist() == expected


def assert_uniform(cells, shape):
    """Chi-square of counts over equally likely cells: within five standard deviations.

    ``cells`` are tuples of int64 arrays, one per axis of ``shape``. The statistic has the mean
    ``dof`` and the variance ``2·dof``. Too small would be as wrong as too large: too even.
    """
    flat = np.zeros_like(cells[0])
    for cell, size in zip(cells, shape, strict=True):
        flat = flat * size + cell
    counts = np.bincount(flat, minlength=np.prod(shape))
    assert len(counts) == np.prod(shape)
    mean = len(flat) / len(counts)
    assert mean >= 20
    dof = len(counts) - 1
    chi_square = ((counts - mean) ** 2 / mean).sum()
    assert abs(chi_square - dof) < 5 * (2 * dof) ** 0.5


SAMPLES = np.arange(50_000)


def draws(seed, epoch, indices=SAMPLES):
    return Augmentation(4, True).draw(seed, epoch, indices)


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("epoch", [0, 1, 239])
def test_crops_and_flips_are_uniform(seed, epoch):
    assert_uniform(draws(seed, epoch), (9, 9, 2))


@pytest.mark.parametrize("epoch", [0, 239])
def test_cutouts_are_uniform_and_independent_of_crops(epoch):
    row, column = Augmentation(4, True, 8).draw_cutout(1, epoch, SAMPLES, 16, 12)
    assert_uniform((row + 4, column + 4), (16, 12))
    assert_uniform((row + 4, draws(1, epoch)[0]), (16, 9))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0, SAMPLES), (0, 1, SAMPLES)),  # the next epoch
        ((0, 7, SAMPLES), (0, 8, SAMPLES)),
        ((0, 0, SAMPLES), (1, 0, SAMPLES)),  # the next seed
        ((0, 1, SAMPLES), (1, 0, SAMPLES)),  # seed and epoch are not merely added
        ((0, 0, SAMPLES), (2**32, 0, SAMPLES)),  # the seed's upper half
        ((0, 0, SAMPLES), (0, 0, SAMPLES + 1)),  # the neighbour
        ((0, 0, SAMPLES), (0, 1, SAMPLES + 1)),
    ],
)
def test_draws_are_independent(first, second):
    a, b = draws(*first), draws(*second)
    for x, y in itertools.product(range(3), repeat=2):
        assert_uniform((a[x], b[y]), ((9, 9, 2)[x], (9, 9, 2)[y]))


def test_one_sample_sees_every_crop_over_the_epochs():
    drawn = [draws(3, epoch, np.array([0, 1, 77])) for epoch in range(4000)]
    tops, lefts, flips = (np.stack(axis) for axis in zip(*drawn, strict=True))
    for sample in range(3):
        assert_uniform((tops[:, sample], lefts[:, sample], flips[:, sample]), (9, 9, 2))


def test_order_is_a_fair_shuffle():
    """Where a sample lands says nothing of where it lands next, nor its neighbour, nor its crop."""
    count, bins = 50_000, 8
    place, next_place = (
        sample_order(0, epoch, count).argsort() * bins // count for epoch in (0, 1)
    )
    assert_uniform((place, next_place), (bins, bins))
    assert_uniform((place, np.roll(place, 1)), (bins, bins))
    assert_uniform((place, draws(0, 0)[0]), (bins, 9))
    numbers = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    seen = [numbers[tuple(sample_order(5, epoch, 4).tolist())] for epoch in range(4000)]
    assert_uniform((np.array(seen),), (24,))


def test_normalisation_table_is_the_nearest_float32():
    """Against exact rationals: off by at most half a unit in the last place, and float64 dust."""
    mean, std = (0.5071, 0.4865, 0.0), (0.2673, 0.2564, 1.0)
    table = normalisation_table(mean, std)
    assert table.dtype == np.float32
    assert table.shape == (3, 256)
    for channel, value in itertools.product(range(3), range(256)):
        exact = (Fraction(value, 255) - Fraction(mean[channel])) / Fraction(std[channel])
        error = abs(Fraction(float(table[channel, value])) - exact)
        assert error <= Fraction(float(np.spacing(abs(table[channel, value])))) * Fraction(
            501, 1000
        )
    assert table[2, 0] == 0.0
    assert table[2, 255] == 1.0


def test_flat_channel_is_refused():
    with pytest.raises(UserError, match="standard deviation of each channel must be positive"):
        normalisation_table((0.5, 0.5, 0.5), (0.2, 0.0, 0.2))
