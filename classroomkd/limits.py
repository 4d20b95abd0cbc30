"""Limits of values, in a module without imports."""

from typing import Literal

Backend = Literal["auto", "ffcv", "resident", "torch"]
"""The kinds of loader."""

# The largest temperature at which float32 is accurate enough: with up to 16 mentors, the loss of a
# batch and its gradient are within 1e-3 of their float64 values, or within a thousandth of them
# where they are above 1 (docs/method.md). The error grows with τ².
MAX_TEMPERATURE = 20.0

LARGEST_SIDE = 1024  # pixels of an image; larger ones would hardly fit in memory

# The α of MixUp and CutMix; 0 turns them off. At the largest α, nearly every share is 1/2; at the
# smallest, nearly every image is unmixed; far below, the computed quantiles of Beta are wrong.
MIN_ALPHA, MAX_ALPHA = 1e-3, 1e3
ALPHAS = f"0, or from {MIN_ALPHA:g} to {MAX_ALPHA:g}"


def is_alpha(value: float) -> bool:
    """Whether ``value`` is one of `ALPHAS`; NaN is not."""
    return value == 0 or MIN_ALPHA <= value <= MAX_ALPHA
