"""Statistics of the loss over one batch, kept on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from classroomkd.kernels.report_layout import BATCH_STATISTICS, MENTOR_STATISTICS


class ClassroomReport(NamedTuple):
    """Means over one batch, on the logits' device; nothing here has been read back to the host.

    Float32 (float64 for float64 logits), without gradient. M is the number of mentors; a row is
    valid unless its target is ``ignore_index``. With no valid row every entry is 0.

    ``mentor_loss / (loss of reduction "mean")`` is the mentors' share of the loss. Close to 1 for
    many steps while ``student_confidence`` stays at chance, it means that the mentors outweigh the
    task: lower ``mentor_weight``.
    """

    active_share: Tensor
    """[M] share of the valid rows in which the mentor teaches, 0 to 1."""
    rank_weight: Tensor
    """[M] mean rank r_m over the valid rows, 0 to M."""
    temperature: Tensor
    """[M] mean temperature τ_m over the valid rows (with ``mentoring="dtkd"`` T_m)."""
    kl: Tensor
    """[M] mean KL_m, in nats and without its τ², over the rows where the mentor teaches, else 0."""
    student_confidence: Tensor
    """[] mean exp(ℓ_s) over the valid rows: the probability the student gives the target."""
    task_loss: Tensor
    """[] mean cross-entropy of student and target over the valid rows, in nats, unweighted."""
    mentor_loss: Tensor
    """[] mean over the valid rows of Σ_m active_m · g_m · r_m · τ_m² · KL_m: with the mean of
    a_s · CE it adds up to the loss of ``reduction="mean"``."""


class RowReport(NamedTuple):
    """Which mentor taught which row: what ``return_report="rows"`` gives, on the logits' device.

    It is computed by definition, beside the loss, so that it costs about as much as the loss in
    plain PyTorch: for analysis, not for every step. Rows whose target is ``ignore_index`` have 0.
    """

    active: Tensor
    """[M, B, …] bool: whether the mentor teaches."""
    rank_weight: Tensor
    """[M, B, …] its rank r_m, 0 to M."""
    temperature: Tensor
    """[M, B, …] its temperature τ_m (with ``mentoring="dtkd"`` T_m)."""


def pack_report(report: ClassroomReport) -> Tensor:
    """A report as the vector of ``kernels/report_layout.py``."""
    return torch.cat([values.reshape(-1) for values in report])


def unpack_report(means: Tensor, n_mentors: int) -> ClassroomReport:
    """The inverse of `pack_report`; its entries are views."""
    sizes = [n_mentors] * len(MENTOR_STATISTICS) + [len(BATCH_STATISTICS)]
    *of_mentors, of_batch = means.split_with_sizes(sizes)
    return ClassroomReport(*of_mentors, *of_batch.unbind())
