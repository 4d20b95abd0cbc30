"""Values that are accepted, where they can be read without importing what they belong to."""

from typing import Literal

Backend = Literal["auto", "ffcv", "resident", "torch"]
"""What feeds a run with images."""

# float32 bears it: at this temperature each lesson τ²·KL is still within 1e-3 of its value, or
# within a thousandth of it where it is above 1 (docs/method.md). The error grows with τ².
MAX_TEMPERATURE = 40.0

# The α of MixUp and CutMix where it is not 0, which is off. At the largest nearly every share is
# 1/2, at the smallest nearly every image stays unmixed; far below, Beta's quantiles come out wrong.
MIN_ALPHA, MAX_ALPHA = 1e-3, 1e3
ALPHAS = f"0, or from {MIN_ALPHA:g} to {MAX_ALPHA:g}"


def is_alpha(value: float) -> bool:
    """Whether it is one of `ALPHAS`; NaN is not."""
    return value == 0 or MIN_ALPHA <= value <= MAX_ALPHA
