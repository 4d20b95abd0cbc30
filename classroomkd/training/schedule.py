"""Learning rates as functions of progress, so that one schedule serves any number of epochs.

Progress is the share of epochs already done when an epoch begins: 0 for the first, below 1 always.
At 240 epochs and the default peak these are the published CIFAR schedules.
"""

from __future__ import annotations

PEAK = 0.05
_MILESTONES = (5 / 8, 6 / 8, 7 / 8)


def mentor_learning_rate(progress: float, peak: float = PEAK) -> float:
    """``peak``, a tenth of the rate before at each of 5/8, 6/8 and 7/8 of the training."""
    return peak * 0.1 ** sum(progress >= milestone for milestone in _MILESTONES)


def student_learning_rate(progress: float, peak: float = PEAK) -> float:
    """Linear from ``peak`` to a fifth of it over the first half, then as the mentors' rate falls.

    The student alone takes it too: only then does the classroom alone make the difference.
    """
    return mentor_learning_rate(progress, peak) * (1 - 0.8 * min(2 * progress, 1.0))
