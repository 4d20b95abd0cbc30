"""Learning rates as functions of progress, so that a schedule applies to any number of epochs.

Progress is the share of the training that is done, 0 at its start and below 1. "steps" keeps the
peak and divides it by ten at each milestone; "classroom" also falls linearly to a fifth over the
first half. Both change from epoch to epoch, and are the published CIFAR schedules at 240 epochs and
a peak of 0.05. "cosine" is half a cosine from the peak to 0, step by step. A warm-up multiplies any
of them by a ramp from 0 to 1.

The student alone is trained with the same schedule as with mentors, so that the mentors are the
only difference.
"""

from __future__ import annotations

import math

from torch import nn

from classroomkd.models.zoo import has_depthwise_convolutions
from classroomkd.training.config import TrainingConfig

PEAK = 0.05
_PEAK_OF_DEPTHWISE = 0.01  # networks with depthwise convolutions diverge at more


def peak_learning_rate(training: TrainingConfig, network: nn.Module) -> float:
    """The schedule's peak: as given, or the usual one for a network."""
    if training.learning_rate is not None:
        return training.learning_rate
    return _PEAK_OF_DEPTHWISE if has_depthwise_convolutions(network) else PEAK


def learning_rate(training: TrainingConfig, peak: float, epochs_done: float) -> float:
    """The rate after ``epochs_done`` epochs, 0 ≤ epochs_done < ``training.epochs``."""
    # The epoch of this step, robust to rounding.
    progress = math.floor(epochs_done + 1e-9) / training.epochs
    if training.schedule == "cosine":
        rate = peak * 0.5 * (1 + math.cos(math.pi * epochs_done / training.epochs))
    else:
        rate = peak * 0.1 ** sum(progress >= milestone - 1e-9 for milestone in training.milestones)
        if training.schedule == "classroom":
            rate *= 1 - 0.8 * min(2 * progress, 1.0)
    if epochs_done < training.warmup_epochs:
        rate *= epochs_done / training.warmup_epochs
    return rate
