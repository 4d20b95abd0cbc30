"""The loss's options and the checks on them, shared by the definition and the kernels.

A new option is a field of `LossOptions` and a key of `OptionValues`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from classroomkd.limits import MAX_TEMPERATURE

RANKINGS = ("sample", "batch")
KNOWLEDGE_FILTERS = ("better", "correct", "correct_and_better", "none")
MENTORINGS = ("adaptive", "fixed", "none", "dtkd")
WEIGHTINGS = ("rank", "uniform", "confidence")
REDUCTIONS = ("mean", "sum", "none")
CONFIDENCE = "confidence"
AUTOMATIC = "auto"


class OptionValues(TypedDict, total=False):
    """Options as keyword arguments, without ``mentor_weight``, which may also be a tensor."""

    temperature: float
    ranking: str
    knowledge_filter: str
    mentoring: str
    weighting: str
    task_weight: float | str
    rank_decimals: int | None
    label_smoothing: float
    ignore_index: int
    reduction: str


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
    task_weight: float | str = CONFIDENCE
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
        if self.task_weight != CONFIDENCE:
            if isinstance(self.task_weight, str):
                raise ValueError(
                    f"task_weight must be {CONFIDENCE!r} or a number, got {self.task_weight!r}"
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
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit 64 bits, got {self.ignore_index}")

    @property
    def fixed_task_weight(self) -> float | None:
        """The number that weighs the cross-entropy; None if the student's confidence does."""
        return None if isinstance(self.task_weight, str) else self.task_weight

    @property
    def fixed_mentor_weight(self) -> float | None:
        """The number that multiplies every mentor's term; None if it follows from C and M."""
        if self.mentor_weight is None:
            return 1.0
        return None if isinstance(self.mentor_weight, str) else self.mentor_weight

    def mentor_weight_for(self, n_classes: int, n_mentors: int) -> float:
        """The number that multiplies every mentor's term, given C and M."""
        fixed = self.fixed_mentor_weight
        return automatic_mentor_weight(n_classes, n_mentors) if fixed is None else fixed

    def flat(self) -> tuple[float | str | None, ...]:
        """The options in order, in the types of `OPERATOR_SCHEMA`, which has no unions."""
        numbers = {
            "task_weight": self.fixed_task_weight,
            "mentor_weight": self.fixed_mentor_weight,
        }
        return tuple((vars(self) | numbers).values())

    @classmethod
    def of_flat(cls, values: Sequence[Any]) -> LossOptions:
        """The inverse of `flat`."""
        given = named(values)
        if given["task_weight"] is None:
            given["task_weight"] = CONFIDENCE
        if given["mentor_weight"] is None:
            given["mentor_weight"] = AUTOMATIC
        return cls(**given)


_NAMES = tuple(field.name for field in fields(LossOptions))
_SCHEMA_TYPES = {
    "float": "float",
    "int": "int",
    "str": "str",
    "int | None": "int?",
    "float | str": "float?",
    "float | str | None": "float?",
}
OPERATOR_SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES[str(field.type)]} option_{field.name}" for field in fields(LossOptions)
)
"""How a PyTorch operator declares what `LossOptions.flat` gives."""


def named(values: Sequence[Any]) -> dict[str, Any]:
    """What `LossOptions.flat` gave, by the options' names."""
    return dict(zip(_NAMES, values, strict=True))


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
