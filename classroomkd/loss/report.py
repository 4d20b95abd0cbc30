"""What the loss saw in one batch, left on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ClassroomReport(NamedTuple):
    """Means over one batch, on the logits' device; nothing here has been read back to the host.

    Float32 (float64 for float64 logits), without gradient. M is the number of mentors; a row is
    valid unless its target is ``ignore_index``. With no valid row every entry is 0.
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
