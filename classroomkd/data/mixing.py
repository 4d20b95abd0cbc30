"""MixUp and CutMix: mix finished images, and their targets, within a batch.

The same function serves all loaders, after augmentation and normalisation. The random numbers of a
sample are a pure function of (seed, epoch, sample index), by the hash of ``augmentation``. Its
partner is the next image of the batch, in the epoch's order; that of the last image is the first.
With h and g the words of the streams 24 and 25, and H and W the images' sides:

Share      λ = the quantile of Beta(α, α) at ((h >> 16) + 1/2) / 2¹⁶, rounded to a multiple of 2⁻²⁴,
           so that λ and 1 − λ are exact in float32.
MixUp      every pixel is λ · own + (1 − λ) · partner's, and so are the class probabilities.
CutMix     of float64 sides a = rint(H·√(1 − λ)) and b = rint(W·√(1 − λ)), ties to even, the box
           that starts at row (((g >> 16) · H) >> 16) − a div 2 and column
           (((g mod 2¹⁶) · W) >> 16) − b div 2, clipped to the image, is the partner's. The own
           class gets the share of pixels outside it, rounded to a multiple of 2⁻²⁴.
Both       CutMix for the samples whose h is odd, MixUp for the others.

Products and sum are rounded separately, in float32 (float64 for float64 images), and then to the
images' dtype, so every device gives the same bits. (Zhang et al., "mixup: beyond empirical risk
minimization"; Yun et al., "CutMix: regularization strategy to train strong classifiers with
localizable features". Both have one λ per batch.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classroomkd.data.augmentation import words
from classroomkd.errors import UserError
from classroomkd.limits import ALPHAS, is_alpha

SHARE, BOX = 24, 25  # the streams


@dataclass(frozen=True)
class Mixing:
    """Mixes batches of ``num_classes`` classes by MixUp, by CutMix, or each sample by one of both.

    ``mixup`` and ``cutmix`` are the α of Beta(α, α), from 0.001 to 1000, or 0 to disable one.
    Raises UserError if one is out of range, both are 0, or ``num_classes`` is below 1.
    """

    num_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not is_alpha(getattr(self, name)):
                raise UserError(f"{name} must be {ALPHAS}, got {getattr(self, name)}")
        if not (self.mixup or self.cutmix):
            raise UserError("mixup or cutmix must be above 0; without both, pass no mixing")
        if self.num_classes < 1:
            raise UserError(f"num_classes must be at least 1, got {self.num_classes}")

    def draw(
        self, seed: int, epoch: int, indices: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw the random numbers of the samples ``indices`` [B], with height × width images.

        Returns:
            The weight of the own pixels outside the box, float64 [B]; the box of the partner's
            pixels as first row, first column, end row and end column, int64 [B, 4]; and the own
            class's probability, float64 [B].

        """
        h = words(SHARE, seed, epoch, indices).astype(np.int64)
        g = words(BOX, seed, epoch, indices).astype(np.int64)
        is_cut = (h & 1) == 1 if self.mixup and self.cutmix else np.full(h.shape, self.cutmix > 0)
        weight = np.ones(h.shape)
        boxes = np.zeros((*h.shape, 4), np.int64)
        if self.mixup:
            weight = np.where(is_cut, 1.0, _quantiles(self.mixup)[h >> 16])
        if self.cutmix:
            side = np.sqrt(1 - _quantiles(self.cutmix)[h >> 16])
            for axis, (length, at) in enumerate(((height, g >> 16), (width, g & 0xFFFF))):
                part = np.rint(length * side).astype(np.int64)
                first = ((at * length) >> 16) - part // 2
                boxes[:, axis] = np.where(is_cut, np.clip(first, 0, length), 0)
                boxes[:, axis + 2] = np.where(is_cut, np.clip(first + part, 0, length), 0)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return weight, boxes, np.where(is_cut, _exact(1 - area / (height * width)), weight)

    def __call__(
        self, images: Tensor, targets: Tensor, seed: int, epoch: int, indices: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch, on its device, without waiting for it.

        Args:
            images: [B, 3, H, W], floating, normalised.
            targets: class indices, int64 [B].
            seed: of the hash.
            epoch: of the hash.
            indices: the samples' indices in their set, int64 [B].

        Returns:
            New images of the same dtype, channels-last in memory, and class probabilities
            [B, num_classes], float32.

        Raises:
            UserError: a target is out of range. On a GPU that is a device-side assertion, as in
                PyTorch's cross-entropy.

        """
        device, (height, width) = images.device, images.shape[2:]
        shares, boxes, owns = self.draw(seed, epoch, indices, height, width)
        drawn = torch.from_numpy(np.column_stack((shares, owns, boxes)).astype(np.float32))
        if device.type == "cuda":
            drawn = drawn.pin_memory().to(device, non_blocking=True)
        weight, own, *box = drawn.T
        weight = weight[:, None, None, None]
        if self.cutmix:
            top, left, bottom, right = (edge[:, None] for edge in box)
            rows, columns = (torch.arange(n, device=device) for n in (height, width))
            inside = ((rows >= top) & (rows < bottom))[:, :, None]
            inside = inside & ((columns >= left) & (columns < right))[:, None]
            weight = torch.where(inside[..., None], 0.0, weight)
        pixels = images.permute(0, 2, 3, 1)
        mixed = (pixels * weight).add_(pixels.roll(-1, 0) * (1 - weight))
        if device.type == "cpu" and not ((targets >= 0) & (targets < self.num_classes)).all():
            raise UserError(
                f"the targets must be within 0..{self.num_classes - 1} to be mixed, got "
                f"{targets.min().item()}..{targets.max().item()}"
            )
        classes = F.one_hot(targets, self.num_classes)
        own = own[:, None]
        probabilities = classes * own + classes.roll(-1, 0) * (1 - own)
        return mixed.to(images.dtype).permute(0, 3, 1, 2), probabilities


@cache
def _quantiles(alpha: float) -> np.ndarray:
    """The quantiles of Beta(α, α) at the midpoints of 2¹⁶ equal parts of 0..1, float64 [65536]."""
    from scipy.special import betaincinv  # slow to import

    return _exact(betaincinv(alpha, alpha, (np.arange(2**16) + 0.5) / 2**16))


def _exact(share: np.ndarray) -> np.ndarray:
    return np.rint(share * 2**24) / 2**24
