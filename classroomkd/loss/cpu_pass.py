"""The fused pass on CPU tensors: what ``kernels/launch.py`` is to a GPU's.

``cpu_rows.py`` does the work. Rows are shared out over torch's number of threads, each of which
writes its own rows' numbers; these are added up in the rows' order, so that every number of threads
gives the same bits. The threads are Python's and numba's own are not used: those allow no second
call beside the first and do not survive a fork, as the loaders' workers make.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from classroomkd.kernels.layout import flattened, in_place
from classroomkd.kernels.report_layout import report_size
from classroomkd.loss import cpu_rows, cpu_vectors

if TYPE_CHECKING:
    from classroomkd.loss.options import LossOptions

_KINDS = {
    torch.float32: cpu_vectors.FLOAT32,
    torch.float16: cpu_vectors.FLOAT16,
    torch.bfloat16: cpu_vectors.BFLOAT16,
}
_MENTORINGS = {
    "adaptive": cpu_rows.ADAPTIVE,
    "fixed": cpu_rows.FIXED,
    "none": cpu_rows.FIXED,
    "dtkd": cpu_rows.DTKD,
}
_WEIGHTINGS = {
    "rank": cpu_rows.BY_RANK,
    "uniform": cpu_rows.UNIFORM,
    "confidence": cpu_rows.BY_CONFIDENCE,
}
# Exponentials, about a nanosecond each, for which another thread is woken; and how many take the
# time of what a network has once a row.
_LEAST_SHARE, _ROW = 100_000, 64
_NO_SUMS, _NO_WEIGHTS, _NO_STATS = (
    *(np.empty(0, np.float32), np.empty(0), np.empty((0, 0), np.float32)),
)


class Outputs(NamedTuple):
    """The tensors that a pass writes, as a launch's: see ``kernels/launch.py``."""

    loss: Tensor
    grad: Tensor | None
    count: Tensor | None  # type: ignore[assignment]  # a tuple has a method of this name
    report: Tensor | None


def confidence_sums(
    student: Tensor, mentors: Sequence[Tensor], targets: Tensor, options: LossOptions
) -> Tensor:
    """Sums over the valid rows of ℓ_k, the student's first, and their number: float32 [M + 2].

    Raises:
        ValueError: a class index that names no class.

    """
    batch = _Batch(student, mentors, targets, options)
    ells = np.empty((batch.n_rows, 1 + len(mentors)), np.float32)
    batch.share_out(
        cpu_rows.confidences,
        1 + len(mentors),
        batch.table(None),
        batch.indices,
        student.shape[1],
        float(options.label_smoothing),
        options.ignore_index,
        ells,
    )
    sums = np.append(ells.sum(0, dtype=np.float64), batch.n_valid)
    return torch.from_numpy(sums).float()


def classroom_loss_and_grad(
    student: Tensor,
    mentors: Sequence[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
    mentor_weight: Tensor | None,
    ell_sums: Tensor | None,
    options: LossOptions,
    *,
    with_grad: bool,
    with_report: bool,
    scale_grad: bool = False,
    scale: Tensor | None = None,
) -> Outputs:
    """Loss, gradient and report; arguments as for ``kernels/launch.py``.

    Raises:
        ValueError: a class index that names no class.

    """
    batch = _Batch(student, mentors, targets, options)
    n_rows, n_classes = batch.n_rows, student.shape[1]
    n_mentors, mean = len(mentors), options.reduction == "mean"
    row_weights, count = _NO_WEIGHTS, float(max(batch.n_valid, 1))
    if row_weight is not None:
        row_weights = row_weight.double().contiguous().numpy()
        count = float(row_weights.sum()) or 1.0
    factor = 1.0
    if scale_grad:
        factor = (1.0 if scale is None else scale.item()) / (count if mean else 1)
    weights, *constants = _constants(options, n_classes, n_mentors)
    if mentor_weight is not None:
        weights = weights * mentor_weight.double().numpy()
    grad = torch.empty((n_rows, n_classes), dtype=student.dtype) if with_grad else None
    losses, loss = np.empty(n_rows, np.float32), np.empty((), np.float32)
    stats, report = _NO_STATS, _NO_SUMS
    if with_report:
        n_stats = report_size(n_mentors)
        stats, report = np.empty((n_rows, n_stats), np.float32), np.empty(n_stats, np.float32)
    batch.share_out(
        cpu_rows.rows,
        1 + 3 * n_mentors,
        batch.table(grad),
        batch.indices,
        row_weights,
        _NO_SUMS if ell_sums is None else ell_sums.numpy(),
        weights,
        n_classes,
        *constants,
        factor,
        int(scale_grad),
        losses,
        stats,
    )
    cpu_rows.totals(losses, stats, batch.n_valid, count if mean else 1.0, loss, report)
    counted = not scale_grad and (options.reduction != "none" or with_report)
    return Outputs(
        torch.from_numpy(losses if options.reduction == "none" else loss),
        None if grad is None else _like_logits(grad, student),
        torch.tensor(count, dtype=torch.float32) if counted else None,
        torch.from_numpy(report) if with_report else None,
    )


@functools.lru_cache
def _constants(options: LossOptions, n_classes: int, n_mentors: int) -> tuple[Any, ...]:
    """What `cpu_rows.rows` takes that the options and sizes decide: the weights, never written to,
    and from ``label_smoothing`` to ``weighting``.
    """
    decimals, task_weight = options.rank_decimals, options.fixed_task_weight
    return (
        np.full(n_mentors, options.mentor_weight_for(n_classes, n_mentors)),
        float(options.label_smoothing),
        options.ignore_index,
        1.0 if options.mentoring == "none" else float(options.temperature),
        math.nan if task_weight is None else float(task_weight),
        0.0 if decimals is None else 10.0**decimals,
        int("better" in options.knowledge_filter),
        int("correct" in options.knowledge_filter),
        _MENTORINGS[options.mentoring],
        _WEIGHTINGS[options.weighting],
    )


def _like_logits(grad: Tensor, student: Tensor) -> Tensor:
    """Rows [N, C] in shape and memory as ``kernels/layout.py`` has the gradient."""
    if student.dim() == 2:
        return grad
    n_images, n_classes, n_positions = student.shape
    grad = grad.view(n_images, n_positions, n_classes).transpose(1, 2)
    return grad.contiguous() if in_place(student) else grad


def scale_rows(
    grad: Tensor, factor: Tensor, row_weight: Tensor | None, count: Tensor | None
) -> Tensor:
    """grad · factor · row_weight / count; arguments as for ``kernels/launch.py``."""
    factor = factor.float()
    if row_weight is not None:
        factor = factor * row_weight.float()
    if count is not None:
        factor = factor / count
    if factor.dim():
        factor = factor.reshape(grad.shape[0], 1, *grad.shape[2:])
    return (grad.float() * factor).to(grad.dtype)


class _Batch:
    """Where a batch's tensors are, in the form that ``cpu_rows`` takes."""

    def __init__(
        self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor, options: LossOptions
    ) -> None:
        self._logits = [_rows(logits) for logits in (student, *mentors)]
        self.n_rows, self._classes = self._logits[0].shape
        self._probabilities: Tensor | None = None
        if targets.dim() > 1:
            self._probabilities = _rows(targets if targets.dtype in _KINDS else targets.float())
            self.indices, self.n_valid = 0, self.n_rows
            return
        if targets.dtype != torch.int64 or targets.stride(0) != 1:
            targets = targets.to(torch.int64).contiguous()
        self._indices = targets  # for as long as their address is used
        self.indices = targets.data_ptr()
        self.n_valid, bad = cpu_rows.survey(
            self.indices, self.n_rows, options.ignore_index, self._classes
        )
        if bad >= 0:
            raise ValueError(
                f"targets must be class indices from 0 to {self._classes - 1} or "
                f"ignore_index={options.ignore_index}, got {int(targets[bad])} in row {bad}"
            )

    def table(self, grad: Tensor | None) -> np.ndarray:
        """The tensors as `cpu_rows.rows` takes them."""
        tensors = *self._logits, self._probabilities, grad
        layout = tuple([None if x is None else (x.stride(0), x.dtype) for x in tensors])
        table = _layout_table(layout).copy()
        table[:, 0] = [0 if x is None else x.data_ptr() for x in tensors]
        return table

    def share_out(
        self, function: Callable[..., None], exponentials: int, *arguments: object
    ) -> None:
        """Call ``function(first, last, *arguments)`` for all rows, in several threads at once."""
        work = exponentials * self.n_rows * (self._classes + _ROW)
        n_shares = min(torch.get_num_threads(), self.n_rows, work // _LEAST_SHARE)
        if n_shares < 2:
            function(0, self.n_rows, *arguments)
            return
        cuts = [self.n_rows * share // n_shares for share in range(n_shares + 1)]
        (first, last), *others = itertools.pairwise(cuts)
        calls = [_pool().submit(function, *share, *arguments) for share in others]
        function(first, last, *arguments)
        for call in calls:
            call.result()


def _rows(logits: Tensor) -> Tensor:
    """[N, C] with the classes of a row side by side; copied where they are not."""
    rows = logits if logits.dim() == 2 else flattened(logits)
    return rows if rows.stride(1) == 1 else rows.contiguous()


@functools.lru_cache
def _layout_table(layout: tuple[tuple[int, torch.dtype] | None, ...]) -> np.ndarray:
    """Rows of address, here 0, bytes from row to row, and kind."""
    table = np.zeros((len(layout), 3), np.int64)
    for place, stride_and_dtype in zip(table, layout, strict=True):
        if stride_and_dtype is not None:
            stride, dtype = stride_and_dtype
            place[1:] = stride * dtype.itemsize, _KINDS[dtype]
    return table


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "classroomkd-loss")


# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
