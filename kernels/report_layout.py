"""The layout of a report: the kernels write it, and ``classroomkd.loss.classroom_report`` reads it.

A report is a vector: M numbers for each statistic of the mentors, one per mentor, then one number
for each statistic of the batch.
"""

from __future__ import annotations

MENTOR_STATISTICS = ("active_share", "rank_weight", "temperature", "kl")
BATCH_STATISTICS = ("student_confidence", "task_loss", "mentor_loss")


def report_size(n_mentors: int) -> int:
    """The numbers in a report."""
    return len(MENTOR_STATISTICS) * n_mentors + len(BATCH_STATISTICS)
