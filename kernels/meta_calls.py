"""Calls of the loss on tensors that have shapes, strides and dtypes but no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from classroomkd.kernels.launch import Launch, classroom_launch, confidence_launch, scaling_launch
from classroomkd.loss.options import LossOptions


def call_launches(
    *,
    n_classes: int,
    n_mentors: int,
    warp_size: int = 32,
    n_rows: int = 512,
    dtype: torch.dtype = torch.float32,
    mentor_dtypes: Sequence[torch.dtype] | None = None,
    targets: torch.dtype = torch.int64,
    row_padding: int = 0,
    n_positions: int | None = None,
    row_weight: bool = False,
    mentor_weight: torch.dtype | None = None,
    ranking: str = "sample",
    gradient: str = "finished",
    scale: torch.dtype = torch.float32,
    with_report: bool = False,
    **options: Any,
) -> dict[str, Launch]:
    """The launches of a call of the loss, with tensors that have no memory.

    Args:
        dtype: of the student's logits, and of the mentors' unless given by ``mentor_dtypes``, in
            order.
        targets: an integer type for class indices, a floating-point one for class probabilities.
        row_padding: elements before each row of the logits, and of class probabilities; before each
            image's with ``n_positions``.
        n_positions: P of logits [B, C, P] in memory of this order, with ``n_rows`` rounded up to
            B · P.
        row_weight: whether rows have weights.
        mentor_weight: its dtype, if given as a tensor; scale: the dtype of the scale for "scaled".
        gradient: "none"; "autograd", with a backward kernel; "finished", as in
            `fused_classroom_loss_and_grad`; "scaled", the same with a scale.
        options: further options of the loss; None stands for the default.

    Returns:
        By name: "confidence" (ranking "batch"), "classroom", "scale_rows" (autograd's backward).

    """
    n_images = -(-n_rows // (n_positions or 1))
    n_rows = n_images * (n_positions or 1)

    def rows(of: torch.dtype) -> Tensor:
        numbers = n_classes * (n_positions or 1)
        wide = torch.empty(n_images, row_padding + numbers, dtype=of, device="meta")
        flat = wide[:, row_padding:]
        return flat if n_positions is None else flat.unflatten(1, (n_classes, n_positions))

    student = rows(dtype)
    mentors = [
        rows(mentor_dtypes[m % len(mentor_dtypes)] if mentor_dtypes else dtype)
        for m in range(n_mentors)
    ]
    soft = targets.is_floating_point
    target_values = rows(targets) if soft else torch.empty(n_rows, dtype=targets, device="meta")
    given = {name: value for name, value in options.items() if value is not None}
    chosen = LossOptions(ranking=ranking, **given)
    launches, ell_sums = {}, None
    if ranking == "batch":
        ell_sums, launches["confidence"] = confidence_launch(
            student,
            mentors,
            target_values,
            chosen,
            warp_size=warp_size,
        )
    number = torch.empty((), device="meta")
    outputs, launches["classroom"] = classroom_launch(
        student,
        mentors,
        target_values,
        number.new_empty(n_rows) if row_weight else None,
        None if mentor_weight is None else number.new_empty(n_mentors, dtype=mentor_weight),
        ell_sums,
        chosen,
        with_grad=gradient != "none",
        with_report=with_report,
        scale_grad=gradient in ("finished", "scaled"),
        scale=number.to(scale) if gradient == "scaled" else None,
        warp_size=warp_size,
    )
    if gradient == "autograd":
        mean = chosen.reduction == "mean"
        _, launches["scale_rows"] = scaling_launch(
            outputs.grad,
            outputs.loss,
            number.new_empty(n_rows) if row_weight else None,
            outputs.count if mean else None,
        )
    return launches
