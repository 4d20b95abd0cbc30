"""The loss's options and the checks on them, shared by the definition and the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from classroomkd.limits import MAX_TEMPERATURE

RANKINGS = ("sample", "batch")
KNOWLEDGE_FILTERS = ("better", "correct", "correct_and_better", "none")
MENTORINGS = ("adaptive", "fixed", "none", "dtkd")
WEIGHTINGS = ("rank", "uniform")
REDUCTIONS = ("mean", "sum", "none")
AUTOMATIC = "auto"


@dataclass(frozen=True)
class LossOptions:
    """What the loss does with logits and targets; docs of each option in `classroom_loss`.

    Raises:
        ValueError: a value is not one of those allowed; the message names the option.
        TypeError: a number was expected.

    """

    temperature: float = 12.0
    ranking: str = "sample"
    knowledge_filter: str = "better"
    mentoring: str = "adaptive"
    weighting: str = "rank"
    task_weight: str | float = "confidence"
    rank_decimals: int | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    mentor_weight: float | str | None = None
    reduction: str = "mean"

    def __post_init__(self) -> None:
        _one_of("ranking", self.ranking, RANKINGS)
        _one_of("knowledge_filter", self.knowledge_filter, KNOWLEDGE_FILTERS)
        _one_of("mentoring", self.mentoring, MENTORINGS)
        _one_of("weighting", self.weighting, WEIGHTINGS)
        _one_of("reduction", self.reduction, REDUCTIONS)
        if not 0 < _number("temperature", self.temperature) <= MAX_TEMPERATURE:
            raise ValueError(
                f"temperature must be greater than 0 and at most {MAX_TEMPERATURE:g}, "
                f"got {self.temperature}"
            )
        if self.task_weight != "confidence":
            if isinstance(self.task_weight, str):
                raise ValueError(
                    f"task_weight must be 'confidence' or a number, got {self.task_weight!r}"
                )
            if not _number("task_weight", self.task_weight) >= 0:
                raise ValueError(f"task_weight must not be negative, got {self.task_weight}")
        if self.mentor_weight is not None:
            _check_mentor_weight(self.mentor_weight)
        if self.rank_decimals is not None:
            _integer("rank_decimals", self.rank_decimals)
            if not 0 <= self.rank_decimals <= 15:
                raise ValueError(
                    f"rank_decimals must be None or between 0 and 15, got {self.rank_decimals}"
                )
        if not 0 <= _number("label_smoothing", self.label_smoothing) <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {self.label_smoothing}")
        _integer("ignore_index", self.ignore_index)

    def weight_of_mentors(self, n_classes: int, n_mentors: int) -> float:
        """The number that multiplies every mentor's term."""
        if self.mentor_weight is None:
            return 1.0
        if self.mentor_weight == AUTOMATIC:
            return automatic_mentor_weight(n_classes, n_mentors)
        return float(self.mentor_weight)


def automatic_mentor_weight(n_classes: int, n_mentors: int) -> float:
    """What ``mentor_weight="auto"`` stands for: min(1, max(1 / 2, C / 200) / M).

    The ranks of M mentors that know the answer add up to nearly M, and each one's gradient is at
    the start about that of cross-entropy, times what its temperature makes of it: by measurement 4
    at 5 classes, 1.6 at 100, 0.35 at 1000, as it falls with C in the end. So the mentors share one
    half between them, where it is less than the paper's 1 each, and with many classes more.
    docs/teaching.md has the measurements.

    Args:
        n_classes: C, at least 1.
        n_mentors: M, at least 1.

    """
    return min(1.0, max(0.5, n_classes / 200) / n_mentors)


def _check_mentor_weight(value: object) -> None:
    if isinstance(value, str):
        if value != AUTOMATIC:
            raise ValueError(f"mentor_weight must be a number or {AUTOMATIC!r}, got {value!r}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"mentor_weight must be None, a number, {AUTOMATIC!r} or a tensor on the logits' "
            f"device, got {value!r}"
        )
    if not _number("mentor_weight", value) >= 0:
        raise ValueError(f"mentor_weight must not be negative, got {value}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(value) < math.inf:  # math.isfinite is beyond torch.compile
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
