"""Random classrooms for the tests of the loss."""

from typing import NamedTuple

import torch
from torch import Tensor

# One entry per option value besides the defaults, then combinations that meet in the code.
OPTIONS = {
    "defaults": {},
    "temperature": {"temperature": 4.0},
    "batch": {"ranking": "batch"},
    "correct": {"knowledge_filter": "correct"},
    "correct_and_better": {"knowledge_filter": "correct_and_better"},
    "unfiltered": {"knowledge_filter": "none"},
    "fixed": {"mentoring": "fixed", "temperature": 4.0},
    "unmentored": {"mentoring": "none"},
    "dtkd": {"mentoring": "dtkd", "temperature": 4.0},
    "uniform": {"weighting": "uniform"},
    "by_confidence": {"weighting": "confidence"},
    "task_weight": {"task_weight": 0.7},
    "no_task": {"task_weight": 0.0},
    "rounded": {"rank_decimals": 2},
    "smoothed": {"label_smoothing": 0.1},
    "ignore_index": {"ignore_index": 3},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "released": {"ranking": "batch", "rank_decimals": 2},
    "released_ablation": {
        "ranking": "batch",
        "knowledge_filter": "none",
        "weighting": "uniform",
        "mentoring": "none",
        "task_weight": 1.0,
    },
    "rounded_correct": {"rank_decimals": 1, "knowledge_filter": "correct_and_better"},
    "smoothed_batch_dtkd": {
        "label_smoothing": 0.2,
        "ranking": "batch",
        "mentoring": "dtkd",
        "knowledge_filter": "correct",
    },
}


# Those that kernels treat otherwise where targets are probabilities, and their defaults.
SOFT = ("defaults", "batch", "correct_and_better", "no_task", "smoothed", "released_ablation")


class Classroom(NamedTuple):
    """Logits and targets of one batch."""

    student: Tensor
    mentors: Tensor
    targets: Tensor

    def to(self, *args: object) -> "Classroom":
        """Move or convert the logits; targets are moved only."""
        device = next((a for a in args if isinstance(a, (str, torch.device))), self.targets.device)
        return Classroom(self.student.to(*args), self.mentors.to(*args), self.targets.to(device))


def classroom(
    n_mentors: int = 3, n_rows: int = 6, n_classes: int = 10, *, scale: float = 3.0, seed: int = 0
) -> Classroom:
    """Mentors of mixed strength, some ahead of the student and some behind, float32 on the CPU."""
    rng = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(n_rows, n_classes, generator=rng)
    mentors = scale * torch.randn(n_mentors, n_rows, n_classes, generator=rng)
    targets = torch.randint(n_classes, (n_rows,), generator=rng)
    strength = scale * torch.rand(n_mentors, n_rows, 1, generator=rng)
    at_target = torch.zeros(n_rows, n_classes).scatter_(1, targets[:, None], 1.0)
    return Classroom(student, mentors + 2 * strength * at_target, targets)


def probabilities(n_rows: int, n_classes: int, seed: int = 0) -> Tensor:
    """Class probabilities [B, C], float32, with some exact zeros."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(n_rows, n_classes, generator=rng)
    values = torch.where(values < 0.3, 0.0, values)
    values[:, 0] += 1e-3
    return values / values.sum(1, keepdim=True)


def at(offset: int, tensor: Tensor) -> Tensor:
    """The same numbers, so many elements after an address that 128 elements' bytes divide."""
    place = torch.empty(tensor.numel() + offset + 128, dtype=tensor.dtype, device=tensor.device)
    start = -(place.data_ptr() // tensor.element_size()) % 128 + offset
    return place[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


# Largest logits of student and mentor half of whose sum, or whose sum, float32 cannot hold.
EXTREME_MAXIMA = [(1e-45, 1e-45), (1e-45, 3e-45), (1e-45, 1.0), (1.0, 1e-45), (2e38, 3e38)]
