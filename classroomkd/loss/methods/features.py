"""Pairing the layers of student and teacher, for methods that compare features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from classroomkd.errors import UserError
from classroomkd.loss.methods.base import Outputs, select_rows

T = TypeVar("T")


def layers(student: str | Sequence[str], teacher: str | Sequence[str]) -> list[tuple[str, ...]]:
    """The paths in texts like "layer2.0,layer3", or in sequences, of student and teacher.

    Raises UserError for anything else, or if both are given and differ in number.
    """
    found = []
    for name, given in (("student_layers", student), ("teacher_layers", teacher)):
        whole = str(given) if type(given) is int else given  # YAML's word for the path "3"
        parts = whole.split(",") if isinstance(whole, str) else whole
        if not isinstance(parts, Sequence) or not all(type(part) in (str, int) for part in parts):
            raise UserError(
                f"{name} must be paths of modules, like layer2.0,layer3 (or, in quotes, '2.0'), "
                f"got {given!r}"
            )
        found.append(tuple(str(part).strip() for part in parts if str(part).strip()))
    if all(found) and len(found[0]) != len(found[1]):
        raise UserError(
            f"student_layers and teacher_layers are paired: give as many, not {len(found[0])} and "
            f"{len(found[1])}"
        )
    return found


def paired(student: Sequence[T], teacher: Sequence[T]) -> list[tuple[T, T]]:
    """Pairs of the same stage, counted from the last, in order; as many as the shorter has."""
    n = min(len(student), len(teacher))
    return list(zip(student[len(student) - n :], teacher[len(teacher) - n :], strict=True))


def paired_features(
    student: Outputs, teacher: Outputs, valid: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Features [B, C_i, H, W], with zeros in rows that do not count, of equal height and width.

    The larger map of a pair is average-pooled to the smaller's size.
    """
    pairs = []
    for own, hint in paired(student.features, [f.detach() for f in teacher.features]):
        size = min(own.shape[2], hint.shape[2]), min(own.shape[3], hint.shape[3])
        own, hint = select_rows(own, valid), select_rows(hint, valid)
        pairs.append((_pooled(own, size), _pooled(hint, size)))
    return pairs


def _pooled(features: Tensor, size: tuple[int, int]) -> Tensor:
    return features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)
