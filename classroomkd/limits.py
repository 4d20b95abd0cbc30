"""Accepted values, in a module that can be imported without what they belong to."""

from typing import Literal

Backend = Literal["auto", "ffcv", "resident", "torch"]
"""The loader that feeds a run with images."""

# The largest temperature at which float32 is accurate enough: with up to 16 mentors the loss of a
# batch and its gradient are still within 1e-3 of their values in float64, or within a thousandth
# where those are above 1 (docs/method.md). The error grows with τ².
MAX_TEMPERATURE = 20.0

# The α of MixUp and CutMix if it is not 0, which turns them off. At the largest, nearly every share
# is 1/2; at the smallest, nearly every image is unmixed; far below, Beta's quantiles are wrong.
MIN_ALPHA, MAX_ALPHA = 1e-3, 1e3
ALPHAS = f"0, or from {MIN_ALPHA:g} to {MAX_ALPHA:g}"


def is_alpha(value: float) -> bool:
    """Whether it is one of `ALPHAS`; NaN is not."""
    return value == 0 or MIN_ALPHA <= value <= MAX_ALPHA
