"""Crops of photographs of varying size to squares of one size.

A random crop is a pure function of (seed, epoch, sample index) and the photograph's height H and
width W, by the hash of ``augmentation``. With h and g the words of the streams 4 + 2a and 5 + 2a,
attempt a of ten draws, in float64,

    area    = H·W · (low + (high − low) · (h >> 16) / 2¹⁶)
    aspect  = exp(log low + (log high − log low) · (h mod 2¹⁶) / 2¹⁶)       width / height
    width   = round(√(area · aspect)),   height = round(√(area / aspect))   ties to even
    row     = ((g >> 16) · (H − height + 1)) >> 16
    column  = ((g mod 2¹⁶) · (W − width + 1)) >> 16

and the first crop that lies inside the photograph is used; if none does, the largest centred crop
whose aspect is within the bounds. The flip is that of ``Augmentation``. (Szegedy et al., "Going
deeper with convolutions", section 6.)

The position of a crop is the same for every loader; its resized pixels are not: FFCV averages over
areas, Pillow (in the torch loader) uses a triangle filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from classroomkd.data.augmentation import Augmentation, words
from classroomkd.errors import UserError
from classroomkd.limits import LARGEST_SIDE

_FIRST_STREAM, _ATTEMPTS = 4, 10


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of a photograph, resized to ``size`` × ``size`` pixels, then a random flip.

    ``area`` bounds the part's share of the photograph's area, ``aspect`` its width divided by its
    height. Raises UserError if bounds are out of order or range, or the size not within 1..1024.
    """

    size: int
    flip: bool = True
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise UserError(f"area must be two shares within 0..1 in order, got {self.area}")
        if not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise UserError(f"aspect must be two positive ratios in order, got {self.aspect}")

    @property
    def after(self) -> Augmentation:
        """The augmentation that remains for the resized crop."""
        return Augmentation(0, self.flip)

    def boxes(
        self, seed: int, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> np.ndarray:
        """First row, first column, height and width, int64 [B, 4], of each sample's crop."""
        boxes = self._centred(heights, widths)
        logs = np.log(self.aspect)
        for attempt in reversed(range(_ATTEMPTS)):  # the first one that fits is written last
            h, g = (
                words(_FIRST_STREAM + 2 * attempt + i, seed, epoch, indices).astype(np.int64)
                for i in range(2)
            )
            area = heights * widths * _between(self.area, h >> 16)
            aspect = np.exp(_between(logs, h & 0xFFFF))
            width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
            height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
            row = ((g >> 16) * (heights - height + 1)) >> 16
            column = ((g & 0xFFFF) * (widths - width + 1)) >> 16
            fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
            boxes[fits] = np.stack((row, column, height, width), axis=1)[fits]
        return boxes

    def _centred(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        narrowest, widest = self.aspect
        height = np.minimum(heights, np.rint(widths / narrowest).astype(np.int64))
        width = np.minimum(widths, np.rint(heights * widest).astype(np.int64))
        return np.stack(((heights - height) // 2, (widths - width) // 2, height, width), axis=1)


@dataclass(frozen=True)
class CentreCrop:
    """The centre of a photograph, resized to ``size`` × ``size`` pixels: for evaluation.

    The side of this square is ``share`` times the photograph's shorter side. Raises UserError if
    the share is not within 0..1, or the size not within 1..1024.
    """

    size: int
    share: float = 224 / 256

    after = None

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.share <= 1:
            raise UserError(f"share must be above 0 and at most 1, got {self.share}")

    def boxes(
        self, seed: int, epoch: int, indices: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> np.ndarray:
        """First row, first column, height and width, int64 [B, 4], of each sample's crop."""
        side = np.maximum((self.share * np.minimum(heights, widths)).astype(np.int64), 1)
        return np.stack(((heights - side) // 2, (widths - side) // 2, side, side), axis=1)


def _check_size(size: int) -> None:
    if not 1 <= size <= LARGEST_SIDE:
        raise UserError(f"size must be within 1..{LARGEST_SIDE} pixels, got {size}")


def _between(bounds: tuple[float, float] | np.ndarray, sixteen_bits: np.ndarray) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * (sixteen_bits / 2**16)
