"""The loss of linear heads: logits exist for a chunk of rows at a time, and never all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from classroomkd.loss import linear_operators
from classroomkd.loss.classroom_report import ClassroomReport, unpack_report
from classroomkd.loss.inputs import (
    INDICES,
    check_float,
    check_mentor_weight,
    check_same_device,
    loss_options,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Head = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]
"""Hidden states [N, H], weight [V, H] and, optionally, bias [V]."""


def fused_linear_classroom_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    mentors: Sequence[Tensor | Head],
    targets: Tensor,
    *,
    student_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    memory_budget: int = 2**28,
    temperature: float = 12.0,
    ranking: str = "sample",
    knowledge_filter: str = "better",
    mentoring: str = "adaptive",
    weighting: str = "rank",
    task_weight: str | float = "confidence",
    rank_decimals: int | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mentor_weight: Tensor | float | str | None = None,
    reduction: str = "mean",
    process_group: ProcessGroup | None = None,
    return_report: bool = False,
) -> Tensor | tuple[Tensor, ClassroomReport]:
    """ClassroomKD's loss of the logits ``hidden @ weight.T + bias``, without holding them.

    The loss and its gradients are those of `fused_classroom_loss` on whole logits. A chunk of rows
    at a time, the logits of the student and of every mentor are computed, the fused pass turns them
    into the loss and the gradient at the student's logits, and two matrix products carry that back
    to hidden states and weight. Beyond the float32 gradients of weight and bias, which are summed
    over the chunks, and that of the hidden states, memory is (M + 2) · chunk_rows · V logits,
    whatever N is. With ranking "batch" the logits are computed twice. With ``reduction="none"``
    they are computed again in the backward pass, as each row's factor is known only then.

    On the CPU, rows whose target is ``ignore_index`` are left out before anything is computed. On a
    GPU, finding them would mean waiting for it: they are computed, and count nowhere.

    The options, from ``temperature`` to ``process_group``, are those of
    `classroomkd.classroom_loss`.

    Args:
        student_hidden: [..., H], float16, bfloat16, float32 or float64.
        student_weight: [V, H], of the same dtype unless autocast is on.
        mentors: M ≥ 1 of: a pair (hidden [..., H_m], weight [V, H_m]), a triple with a bias [V], or
            logits [..., V]. Their sizes H_m and dtypes may differ. They get no gradient.
        targets: class indices [...], the leading dimensions of the hidden states.
        student_bias: [V].
        chunk_rows: rows at a time; None: as many as ``memory_budget`` holds.
        memory_budget: bytes for the chunk's logits and their gradient.
        return_report: also return a `ClassroomReport`.

    Returns:
        The loss, 0-d, or of the targets' shape with ``reduction="none"``, float32 (float64 for
        float64 logits); with ``return_report`` the pair (loss, report). A second derivative raises
        RuntimeError.

    Raises:
        ValueError, TypeError: as `fused_classroom_loss`; for vocabularies that differ, see
            `cut_vocabulary`.

    """
    options, weights = loss_options(
        temperature=temperature,
        ranking=ranking,
        knowledge_filter=knowledge_filter,
        mentoring=mentoring,
        weighting=weighting,
        task_weight=task_weight,
        rank_decimals=rank_decimals,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        mentor_weight=mentor_weight,
        reduction=reduction,
    )
    student = _checked_head(
        ("student_hidden", "student_weight", "student_bias"),
        student_hidden,
        student_weight,
        student_bias,
    )
    shape, n_classes = student_hidden.shape[:-1], student_weight.shape[0]
    heads = _checked_mentors(mentors, student_hidden, n_classes)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if targets.shape != shape or targets.dtype not in INDICES:
        raise ValueError(
            f"targets must be class indices of shape {list(shape)}, got {targets.dtype} of shape "
            f"{list(targets.shape)}"
        )
    check_same_device("targets", targets, student_hidden)
    if weights is not None:
        check_mentor_weight(weights, len(heads), student_hidden)
        weights = weights.detach()
    targets = targets.reshape(-1)
    dtype = None
    if torch.is_autocast_enabled(student_hidden.device.type):
        dtype = torch.get_autocast_dtype(student_hidden.device.type)
    batch = (
        *student,
        [part.detach() for head in heads for part in head],
        [len(head) for head in heads],
        targets,
        _valid_rows(targets, options.ignore_index),
        _rows_per_chunk(chunk_rows, memory_budget, student, heads, dtype),
        dtype,
    )
    ell_sums = None
    if options.ranking == "batch":
        with torch.no_grad():
            ell_sums = linear_operators.confidence_sums(*batch, *options.flat())
        if process_group is not None:
            torch.distributed.all_reduce(ell_sums, group=process_group)
    tracking = torch.is_grad_enabled()
    with_grads = [tracking and part is not None and part.requires_grad for part in student]
    loss, *_, report = linear_operators.loss(
        *batch, weights, ell_sums, None, *with_grads, return_report, *options.flat()
    )
    loss = loss.reshape(shape) if reduction == "none" else loss
    return (loss, unpack_report(report, len(heads))) if return_report else loss


def cut_vocabulary(head: Tensor | Head, size: int) -> Tensor | Head:
    """The first ``size`` classes, as views: for a vocabulary that is padded at its end.

    Args:
        head: a mentor as for `fused_linear_classroom_loss`, or the student's hidden states, weight
            and, optionally, bias.
        size: the number of classes to keep, at most the head's.

    Raises:
        ValueError: the head has fewer classes.

    """
    n_classes = head.shape[-1] if isinstance(head, Tensor) else head[1].shape[0]
    if n_classes < size:
        raise ValueError(f"a head of {n_classes:,} classes cannot be cut to {size:,}")
    if isinstance(head, Tensor):
        return head[..., :size]
    hidden, weight, bias = (*head, None)[:3]
    return hidden, weight[:size], None if bias is None else bias[:size]


class _Head(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


def _checked_head(
    names: Sequence[str], hidden: Tensor, weight: Tensor, bias: Tensor | None = None
) -> _Head:
    """A head of one dtype and device, its hidden states as rows."""
    for name, part, form in zip(
        names, (hidden, weight, bias), ("[..., H]", "[V, H]", "[V]"), strict=True
    ):
        if part is None and part is bias:
            continue
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a tensor of shape {form}, got {type(part).__name__}")
        check_float(name, part)
        check_same_device(name, part, hidden)
        autocast = torch.is_autocast_enabled(part.device.type)
        if part.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"{name} must have the dtype of {names[0]}, {hidden.dtype}, unless autocast is on; "
                f"got {part.dtype}"
            )
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} must have shape [V, H] with the H of {names[0]}, "
            f"{list(hidden.shape[-1:])}; got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{names[2]} must have shape {list(weight.shape[:1])}, got {list(bias.shape)}"
        )
    return _Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)


def _checked_mentors(
    mentors: Sequence[Tensor | Head], student_hidden: Tensor, n_classes: int
) -> list[list[Tensor]]:
    """Each mentor's tensors: logits [N, V], or hidden states, weight and, if there is one, bias."""
    if not isinstance(mentors, Sequence) or not mentors or _is_one_head(mentors, n_classes):
        raise ValueError(
            "mentors must be a sequence of at least one mentor, each logits [..., V], a pair "
            "(hidden, weight) or a triple (hidden, weight, bias); a single head is [(hidden, "
            "weight)]"
        )
    heads = []
    for index, mentor in enumerate(mentors):
        name = f"mentors[{index}]"
        if isinstance(mentor, Tensor):
            check_float(name, mentor)
            rows, classes = mentor.shape[:-1], mentor.shape[-1]
            head = [mentor.reshape(-1, classes)]
        elif isinstance(mentor, Sequence) and len(mentor) in (2, 3):
            names = [f"{name}[{i}]" for i in range(3)]
            head = [part for part in _checked_head(names, *mentor) if part is not None]
            rows, classes = mentor[0].shape[:-1], mentor[1].shape[0]
        else:
            size = f" of {len(mentor)}" if isinstance(mentor, Sequence) else ""
            raise TypeError(
                f"{name} must be logits [..., V], (hidden, weight) or (hidden, weight, bias), got "
                f"{type(mentor).__name__}{size}"
            )
        if classes != n_classes:
            raise ValueError(
                f"{name} has {classes:,} classes, the student {n_classes:,}. If the larger "
                "vocabulary is padded at its end, cut it (classroomkd.loss.cut_vocabulary); if the "
                "tokens differ, map their ids first"
            )
        if rows != student_hidden.shape[:-1]:
            raise ValueError(
                f"{name} must have rows {list(student_hidden.shape[:-1])}, as the student's hidden "
                f"states have, got {list(rows)}"
            )
        check_same_device(name, head[0], student_hidden)
        heads.append(head)
    return heads


def _is_one_head(mentors: Sequence[Tensor | Head], n_classes: int) -> bool:
    """Whether these are the parts of one mentor, and cannot be two or three mentors' logits."""
    if len(mentors) not in (2, 3):
        return False
    hidden, weight = mentors[:2]
    if not isinstance(hidden, Tensor) or not isinstance(weight, Tensor):
        return False
    return weight.shape == (n_classes, hidden.shape[-1]) and hidden.shape[-1] != n_classes


def _valid_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that count, where finding them needs no wait for a device; None: all rows."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    rows = (targets != ignore_index).nonzero().squeeze(1)
    return None if len(rows) == len(targets) else rows


def _rows_per_chunk(
    chunk_rows: int | None,
    memory_budget: int,
    student: _Head,
    heads: Sequence[Sequence[Tensor]],
    dtype: torch.dtype | None,
) -> int:
    """As given, or as many as ``memory_budget`` bytes hold, at least 1; it never depends on N."""
    for name, value in (("chunk_rows", chunk_rows), ("memory_budget", memory_budget)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if chunk_rows is not None:
        return chunk_rows
    # The student's logits and their gradient, and those of each mentor that has a head.
    made = [student.hidden.dtype] * 2 + [head[0].dtype for head in heads if len(head) > 1]
    bytes_per_class = sum((dtype or its).itemsize for its in made)
    return max(1, memory_budget // (bytes_per_class * student.weight.shape[0]))
