"""The checks on the loss's arguments, shared by the definition and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Unpack

import torch
from torch import Tensor

from classroomkd.loss.options import LossOptions, OptionValues

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What logits, class probabilities, mentors' weights and the gradient's scale may be."""
KERNEL_LOGITS = (torch.float32, torch.float16, torch.bfloat16)
"""Of these, the logits that the kernels take; all else they take of any."""
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""What class indices may be."""

_cached_options = lru_cache(typed=True)(LossOptions)


def loss_options(
    mentor_weight: Tensor | float | str | None, **options: Unpack[OptionValues]
) -> tuple[LossOptions, Tensor | None]:
    """The options, and the tensor [M] of the mentors' weights if that is what was given.

    Made and checked once: a later call with the same values returns the same object.
    """
    weights = None
    if isinstance(mentor_weight, Tensor):
        weights, mentor_weight = mentor_weight, None
    if not torch.compiler.is_compiling():  # torch.compile warns of caches
        try:
            return _cached_options(mentor_weight=mentor_weight, **options), weights
        except TypeError:  # a value without a hash, or one that is refused below again
            pass
    return LossOptions(mentor_weight=mentor_weight, **options), weights


def check_inputs(
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    mentor_weight: Tensor | None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> list[Tensor]:
    """Check shapes, dtypes and devices, without looking at any value, and list the mentors.

    Returns:
        The M mentors' logits, each of the student's shape; views where one tensor was given.

    Raises:
        ValueError: shapes or devices do not agree, or there is no mentor.
        TypeError: something is not a tensor, or not of a dtype that makes sense for it.

    """
    _logits("student_logits", student_logits)
    shape, device = student_logits.shape, student_logits.device
    if len(shape) < 2:
        raise ValueError(f"student_logits must have shape [B, C] or [B, C, ...], got {list(shape)}")
    if shape[1] == 0:
        raise ValueError(f"student_logits must have at least one class, got shape {list(shape)}")
    if isinstance(mentor_logits, Tensor):
        if mentor_logits.dim() != 1 + len(shape):
            raise ValueError(
                "mentor_logits must have shape [M, B, C] or be a sequence of [B, C] tensors "
                f"(with the student's further dimensions), got shape {list(mentor_logits.shape)}"
            )
        mentors = list(mentor_logits.unbind(0))
    elif isinstance(mentor_logits, Sequence):
        mentors = list(mentor_logits)
    else:
        raise TypeError(
            "mentor_logits must be a tensor or a sequence of tensors, "
            f"got {type(mentor_logits).__name__}"
        )
    if not mentors:
        raise ValueError("mentor_logits must hold at least one mentor, got M = 0")
    for index, mentor in enumerate(mentors):
        _logits("mentor_logits", mentor, index)
        if mentor.shape != shape:
            raise ValueError(
                f"mentor_logits[{index}] must have the student's shape {list(shape)}, "
                f"got {list(mentor.shape)}"
            )
        if mentor.device != device:  # before its name is put together, which takes longer
            check_same_device(f"mentor_logits[{index}]", mentor, student_logits)
    _check_targets(targets, student_logits)
    if mentor_weight is not None:
        check_mentor_weight(mentor_weight, len(mentors), student_logits)
    for name, weight, allowed in (
        ("class_weight", class_weight, shape[1:2]),
        ("row_weight", row_weight, shape[:1] + shape[2:]),
    ):
        if weight is not None:
            _check_weight(name, weight, list(allowed), student_logits)
    return mentors


def _check_weight(name: str, weight: object, shape: list[int], student_logits: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(weight).__name__}")
    check_float(name, weight)
    if list(weight.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(weight.shape)}")
    check_same_device(name, weight, student_logits)


def check_mentor_weight(mentor_weight: Tensor, n_mentors: int, student: Tensor) -> None:
    """Raise unless the weights are floating-point, [M], and on the student's device."""
    check_float("mentor_weight", mentor_weight)
    if mentor_weight.shape != (n_mentors,):
        raise ValueError(
            f"mentor_weight must have shape [{n_mentors}], one weight per mentor, "
            f"got {list(mentor_weight.shape)}"
        )
    check_same_device("mentor_weight", mentor_weight, student)


def check_float(name: str, value: Tensor) -> None:
    """Raise TypeError for a tensor of another dtype than `FLOATS`."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be {either(FLOATS)}, got {value.dtype}")


def either(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes in words: "float32, float16 or bfloat16"."""
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} or {last}"


def _logits(name: str, value: object, index: int | None = None) -> None:
    if isinstance(value, Tensor) and value.dtype in FLOATS:
        return
    name = name if index is None else f"{name}[{index}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_float(name, value)


def check_same_device(name: str, value: Tensor, student_logits: Tensor) -> None:
    """Raise ValueError unless a tensor is on the student's device."""
    if value.device != student_logits.device:
        raise ValueError(
            f"{name} must be on the student's device {student_logits.device}, got {value.device}"
        )


def _check_targets(targets: Tensor, student_logits: Tensor) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    shape = student_logits.shape
    rows = shape[:1] + shape[2:]
    if targets.dim() == len(shape):
        check_float("targets of the logits' dimensions are class probabilities and", targets)
    elif targets.dim() == len(rows) and targets.dtype not in INDICES:
        raise TypeError(
            f"targets of shape {list(rows)} are class indices and must be integers, "
            f"got {targets.dtype}"
        )
    if targets.shape not in (shape, rows):
        classes_last = targets.shape == shape[:-1]
        raise ValueError(
            f"targets must have shape {list(rows)} (class indices) or {list(shape)} "
            f"(class probabilities), got {list(targets.shape)}"
            + classes_last
            * "; if the last dimension of the logits is that of the classes, "
            "flatten the others: logits [N, C], targets [N]"
        )
    check_same_device("targets", targets, student_logits)
