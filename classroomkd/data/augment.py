"""Sample order, augmentation and normalisation, as pure functions of (seed, epoch, sample index).

Everything random about the data comes from one counter-based hash in 32-bit integer arithmetic,
so that any back end, any number of workers and any order of work give the same image bits. All
arithmetic below is modulo 2³²; ``^`` is exclusive or, ``>>`` a logical shift::

    mix(x):    x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16
    key:       k = stream;  for each w in (seed mod 2³², seed >> 32, epoch):
                   k = mix((k ^ w) + 0x9E3779B9)
    word:      word(stream, seed, epoch, index) = mix(mix(index) ^ key)

``mix`` is a bijection, so the words of one key are distinct for distinct indices. The streams are
0 for the sample order, 1 for crop and flip, 2 for splitting a data set into two.

Order      samples by ascending word (no two are equal).
Crop       with h = word and p = padding: the image is bordered by p black pixels (0, 0, 0), and
           the window of its own size is taken whose first row is ((h >> 17) · (2p + 1)) >> 15 and
           first column (((h >> 2) & 0x7FFF) · (2p + 1)) >> 15, both within 0..2p.
Flip       of the window, left to right, if the lowest bit of h is set.
Normalise  through a float32 table: the float64 value (v/255 − mean)/std, rounded once to float32
           and from there to the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classroomkd.errors import UserError

ORDER, AUGMENT, SPLIT = 0, 1, 2  # the streams

_MASK = 0xFFFFFFFF


def _mix(x):
    """The hash's finaliser, on Python integers or int64 tensors holding values below 2³².

    The multipliers are written as signed numbers, so that no product leaves the range of int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - 2**32)) & _MASK
    return x ^ (x >> 16)


def words(stream: int, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """The hash words of the sample indices (int64, any shape, 0 ≤ index < 2³²), as int64."""
    key = stream
    for part in (seed & _MASK, (seed >> 32) & _MASK, epoch & _MASK):
        key = _mix(((key ^ part) + 0x9E3779B9) & _MASK)
    return _mix(_mix(indices) ^ key)


def sample_order(seed: int, epoch: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of 0..count−1, int64 [count]."""
    return words(ORDER, seed, epoch, torch.arange(count, device=device)).argsort()


@dataclass(frozen=True)
class Augmentation:
    """Random crop from an image bordered by ``padding`` black pixels, then a random flip.

    Raises UserError if the padding is not within 0..1024.
    """

    padding: int
    flip: bool

    def __post_init__(self) -> None:
        if not 0 <= self.padding <= 1024:
            raise UserError(f"padding must be within 0..1024 pixels, got {self.padding}")

    def draw(self, seed: int, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First row, first column (0..2·padding) and flip (0 or 1) of each index, all int64."""
        h = words(AUGMENT, seed, epoch, indices)
        offsets = 2 * self.padding + 1
        top = ((h >> 17) * offsets) >> 15
        left = (((h >> 2) & 0x7FFF) * offsets) >> 15
        return top, left, (h & 1) * int(self.flip)

    def apply(self, images: Tensor, seed: int, epoch: int, indices: Tensor) -> Tensor:
        """Augment uint8 images [B, H, W, 3] (B ≥ 1), the samples ``indices`` [B] of the set."""
        B, H, W, _ = images.shape
        p = self.padding
        top, left, flip = self.draw(seed, epoch, indices)
        batch = torch.arange(B, device=images.device)
        # A row of a crop is 3·W neighbouring bytes of the padded images, starting at any pixel:
        # seen as overlapping rows, one a pixel, all the crops are a single gather of whole rows.
        padded = F.pad(images, (0, 0, p, p, p, p)).contiguous().view(-1)
        windows = padded.as_strided((padded.numel() // 3 - W + 1, 3 * W), (3, 1))
        first = (batch * (H + 2 * p) + top) * (W + 2 * p) + left
        rows = first[:, None] + torch.arange(H, device=images.device) * (W + 2 * p)
        crops = windows.index_select(0, rows.view(-1)).view(B, H, W, 3)
        if not self.flip:
            return crops
        either = torch.stack((crops, crops.flip(2)), dim=1).flatten(0, 1)
        return either.index_select(0, 2 * batch + flip)


def normalisation_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The normalised value of each channel's 256 pixel values, float32 [3, 256].

    ``mean`` and ``std`` are per RGB channel, of values scaled to 0..1. Raises UserError if a
    standard deviation is not positive.
    """
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if not (std > 0).all():
        raise UserError(f"the standard deviation of each channel must be positive, got {std}")
    return ((np.arange(256) / 255 - mean[:, None]) / std[:, None]).astype(np.float32)
