"""Sample order, augmentation and normalisation, as pure functions of (seed, epoch, sample index).

All randomness in the data comes from one counter-based hash in 32-bit integer arithmetic, so every
loader gives the same image bits with any number of workers and in any order of work. All arithmetic
below is modulo 2³²; ``^`` is exclusive or, ``>>`` a logical shift::

    mix(x):    x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
    key:       k = stream;  for each w in (seed mod 2³², seed >> 32, epoch):
                   k = mix((k ^ w) + 0x9E3779B9)
    word:      word(stream, seed, epoch, index) = mix(mix(index) ^ key)

``mix`` is a bijection, so the words of one key are distinct for distinct indices. The streams are
0 for the sample order, 1 for crop and flip, 2 for splitting a data set, 3 for cutout, 4 to 23 for
``crops``, and 24 and 25 for ``mixing``.

Order      samples by ascending word (no two are equal).
Crop       with h = word and p = padding: the image is padded with p black pixels (0, 0, 0) on each
           side, and a window of the original size is cut from it, whose first row is
           ((h >> 17) · (2p + 1)) >> 15 and first column (((h >> 2) & 0x7FFF) · (2p + 1)) >> 15,
           both within 0..2p.
Flip       of the window, left to right, if the lowest bit of h is set.
Normalise  through a float32 table: the float64 value (v/255 − mean)/std, rounded once to float32
           and from there to the requested dtype.
Cutout     with h = word of its own stream: the square of k pixels per side that starts at row
           (((h >> 17) · H) >> 15) − k div 2 and column ((((h >> 2) & 0x7FFF) · W) >> 15) − k div 2
           of the finished image, clipped to the image, is set to 0, the mean colour. (DeVries
           and Taylor, "Improved regularization of convolutional neural networks with cutout".)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from classroomkd.errors import UserError
from classroomkd.limits import LARGEST_SIDE

ORDER, AUGMENT, SPLIT, CUTOUT = 0, 1, 2, 3  # the streams

_MASK = 0xFFFFFFFF


def _mix(x: np.ndarray) -> np.ndarray:
    """The hash's finaliser on uint32 arrays; products wrap."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def stream_key(stream: int, seed: int, epoch: int) -> int:
    """The hash's key, 0 ≤ key < 2³², from the lowest 64 bits of ``seed`` and 32 of ``epoch``."""
    key = stream
    for part in (seed & _MASK, (seed >> 32) & _MASK, epoch & _MASK):
        key = int(_mix(np.array([((key ^ part) + 0x9E3779B9) & _MASK], np.uint32))[0])
    return key


def words(stream: int, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """The hash words, uint32, of the sample indices (integers, any shape, 0 ≤ index < 2³²)."""
    key = np.uint32(stream_key(stream, seed, epoch))
    return _mix(_mix(np.asarray(indices).astype(np.uint32)) ^ key)


def sample_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of 0..count−1, int64 [count]."""
    return words(ORDER, seed, epoch, np.arange(count)).argsort()


@dataclass(frozen=True)
class Augmentation:
    """Random crop from an image padded with ``padding`` black pixels, then a random flip.

    ``cutout`` then erases a square of that many pixels per side; 0 disables it. Raises UserError
    if padding or cutout is not within 0..1024.
    """

    padding: int
    flip: bool
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("padding", "cutout"):
            if not 0 <= getattr(self, name) <= LARGEST_SIDE:
                value = getattr(self, name)
                raise UserError(f"{name} must be within 0..{LARGEST_SIDE} pixels, got {value}")

    def draw(
        self, seed: int, epoch: int, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First row, first column (0..2·padding) and flip (0 or 1) of each index, all int64."""
        h = words(AUGMENT, seed, epoch, indices).astype(np.int64)
        top, left = _places(h, 2 * self.padding + 1, 2 * self.padding + 1)
        return top, left, (h & 1) * int(self.flip)

    def draw_cutout(
        self, seed: int, epoch: int, indices: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """First row and column, int64, of each index's square; they may lie outside the image."""
        h = words(CUTOUT, seed, epoch, indices).astype(np.int64)
        row, column = _places(h, height, width)
        return row - self.cutout // 2, column - self.cutout // 2


def _places(h: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A row below ``rows`` and a column below ``columns`` from bits 17 to 31 and 2 to 16 of h."""
    return ((h >> 17) * rows) >> 15, (((h >> 2) & 0x7FFF) * columns) >> 15


def normalisation_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The normalised value of each channel's 256 pixel values, float32 [3, 256].

    ``mean`` and ``std`` are per RGB channel, of values scaled to 0..1. Raises UserError if a
    standard deviation is not positive.
    """
    means, stds = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if not (stds > 0).all():
        raise UserError(f"the standard deviation of each channel must be positive, got {stds}")
    return ((np.arange(256) / 255 - means[:, None]) / stds[:, None]).astype(np.float32)
