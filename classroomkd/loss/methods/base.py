"""What a method is, and the terms that methods are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classroomkd.errors import UserError
from classroomkd.limits import MAX_TEMPERATURE
from classroomkd.loss.classroom_report import ClassroomReport

IGNORED = -100
"""The target of a row that counts nowhere."""
_LARGEST = 1e6  # a weight: far beyond use, and far from float32's limits
_CONSTANT = 100  # epsilons: values that vary by less count as constant

Shape = tuple[int, int, int]  # C, H, W


class Outputs(NamedTuple):
    """A network's outputs for a batch."""

    logits: Tensor
    """[B, C]"""
    features: tuple[Tensor, ...] = ()
    """Of the layers in order, each [B, C_i, H_i, W_i]; only for methods with ``uses_features``."""


class Method(nn.Module):
    """How a student learns: a loss of its outputs, its mentors' outputs and the targets.

    Subclasses define `forward`, and take their options, checked, as arguments of their constructor.
    Whatever the logits' dtype, arithmetic is in float32, or float64 for float64. Nothing waits for
    the device, and no shape depends on a value, so that a CUDA graph can capture a step.
    """

    single_mentor: ClassVar[bool] = False
    """Only the first mentor, the teacher, is used."""
    uses_features: ClassVar[bool] = False
    """The outputs must hold features, and `prepare` must be called before the first call."""
    student_layers: Sequence[str] = ()
    """The paths of the modules whose outputs are the student's features; () are its stages."""
    teacher_layers: Sequence[str] = ()
    """Likewise of each mentor."""
    soft_labels: ClassVar[bool] = True
    """Whether targets may also be class probabilities [B, C], and not only class indices [B]."""
    reports: ClassVar[bool] = False
    """Whether `backward` returns a report."""

    def prepare(self, student: Sequence[Shape], mentors: Sequence[Sequence[Shape]]) -> None:
        """Create what depends on the shapes of the student's and each mentor's features.

        Parameters created here are trained along with the student's.

        Raises UserError if the method's options do not fit the shapes.
        """

    def __call__(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """`forward`, for targets that the method takes; `backward` comes through here too."""
        if targets.dim() == 2 and not self.soft_labels:
            raise UserError(f"{type(self).__name__} takes class indices, not class probabilities")
        return super().__call__(student, mentors, targets)

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """The loss, 0-d: the mean over the rows whose target, of class indices [B], is not -100.

        Such a row may hold anything, also NaN; if there is no other, the loss is 0. Targets may
        also be class probabilities [B, C], and then every row counts; a call of the method raises
        UserError where it does not take them (``soft_labels``). Only the student's outputs get a
        gradient; the mentors' may be tensors of inference mode.
        """
        raise NotImplementedError

    def backward(
        self,
        student: Outputs,
        mentors: Sequence[Outputs],
        targets: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, ClassroomReport | None]:
        """Backpropagate ``scale`` (0-d; 1 if None) times the loss through the student's outputs.

        Returns:
            The loss, unscaled and without gradient, and the report of methods that have one.

        """
        loss = self(student, mentors, targets)
        loss.backward(scale)
        return loss.detach(), None


class RowMethod(Method):
    """A method whose loss is the mean over rows of `row_losses`."""

    def row_losses(self, student: Tensor, mentors: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Losses [B] of logits [B, C], in float32 or better and 0 in rows that do not count."""
        raise NotImplementedError

    def forward(self, student: Outputs, mentors: Sequence[Outputs], targets: Tensor) -> Tensor:
        """The mean over the rows that count."""
        valid = valid_rows(targets)
        rows = self.row_losses(
            select_rows(student.logits, valid),
            [select_rows(mentor.logits.detach(), valid) for mentor in mentors],
            targets,
        )
        return mean_of_rows(rows, valid)


def valid_rows(targets: Tensor, ignored: int = IGNORED) -> Tensor:
    """Which rows count, bool [B]: those of a class index, all of class probabilities [B, C]."""
    if targets.dim() == 2:
        return torch.ones_like(targets[:, 0], dtype=torch.bool)
    return targets != ignored


def select_rows(values: Tensor, valid: Tensor) -> Tensor:
    """Values [B, …] in float32 or better, with zeros for the rows that do not count.

    Multiplying by 0 would keep their NaN, in the gradient too.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(valid.view(-1, *[1] * (values.dim() - 1)), values, 0)


def mean_of_rows(rows: Tensor, valid: Tensor) -> Tensor:
    """Mean of rows [B] over those that count, 0 if none does."""
    return torch.where(valid, rows, 0).sum() / valid.sum().clamp(min=1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B], of logits [B, C] and class indices [B], 0 where the target is -100, or of probabilities.

    These, t [B, C], give −Σ_c t(c) · log softmax(z)(c), where 0 · −∞ is 0.
    """
    if targets.dim() == 2:
        terms = targets.to(logits.dtype) * F.log_softmax(logits, -1)
        return -torch.where(targets == 0, 0, terms).sum(-1)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


def kl(teacher: Tensor, log_student: Tensor) -> Tensor:
    """KL(teacher ‖ student) [B], of probabilities and log-probabilities [B, C]; 0 · log 0 is 0."""
    terms = teacher * (teacher.log() - log_student)
    terms = torch.where(teacher == 0, 0, terms)  # not > 0: a NaN must stay one
    # Both sum to 1. Where they are nearly equal and each term is a small difference, adding the
    # difference of the two sums cancels their rounding errors.
    divergence = (terms + (log_student.exp() - teacher)).sum(-1)
    return divergence - divergence.detach().clamp_max(0)  # rounding must not make it negative


def tempered_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """KL [B] of the softmaxes of logits [B, C] at one temperature, without its square."""
    log_student = F.log_softmax(student / temperature, -1)
    return kl(F.softmax(teacher / temperature, -1), log_student)


def standardised(logits: Tensor) -> Tensor:
    """Each row's z-score: minus its mean, divided by its (population) standard deviation.

    0, and without gradient, where the row is constant by the criterion of `direction`.
    """
    centred = logits - logits.mean(-1, keepdim=True)
    return direction(centred, logits, -1) * logits.shape[-1] ** 0.5


def direction(centred: Tensor, values: Tensor, dim: int) -> Tensor:
    """``centred`` (values minus their mean along ``dim``) divided by its Euclidean norm.

    0, and without gradient, where the values are constant up to rounding: where that norm is at
    most 100 epsilons of the dtype times the values' norm. Dividing by it would only amplify
    rounding errors, in the gradient too.
    """
    norm = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    size = torch.linalg.vector_norm(values.detach(), dim=dim, keepdim=True)
    constant = norm <= _CONSTANT * torch.finfo(values.dtype).eps * size  # never where one is NaN
    return torch.where(constant, 0, centred) / torch.where(constant, 1, norm)


def check_temperature(temperature: Any) -> None:
    """Raise UserError for a temperature that is not a number above 0, up to the limit."""
    if not (_is_number(temperature) and 0 < temperature <= MAX_TEMPERATURE):
        raise UserError(
            f"temperature must be a number above 0, at most {MAX_TEMPERATURE:g}, "
            f"got {temperature!r}"
        )


def check_not_negative(**options: Any) -> None:
    """Raise UserError for an option that is not a number of at least 0."""
    for name, value in options.items():
        if not (_is_number(value) and 0 <= value <= _LARGEST):
            raise UserError(f"{name} must be a number from 0 to {_LARGEST:.0e}, got {value!r}")


def check_boolean(**options: Any) -> None:
    """Raise UserError for an option that is neither true nor false."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise UserError(f"{name} must be true or false, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
