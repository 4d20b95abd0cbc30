"""The loss by definition: eager PyTorch, in the precision of its inputs, on any device.

Everything else in the project that computes this loss is tested against this file in float64.
It has two halves. `classroom_weights` chooses the mentors that teach, their weights and their
temperatures, without gradient. `weighted_row_loss` is the differentiable loss given those weights.

Symbols, for one row b, k running over the student s and the mentors 1 … M:

    t      target distribution (one-hot, smoothed, or the class probabilities given)
    ℓ_k    Σ_c t(c) log softmax(z_k)(c), the log-confidence; ranking "batch": its mean over rows
    r_k    M · exp(ℓ_k) / Σ_j exp(ℓ_j)
    Δ_m    |r_m − r_s| / max(r_m, r_s) = 1 − exp(−|ℓ_m − ℓ_s|), the lead
    τ_m    1 + temperature · Δ_m (mentoring "adaptive")
    KL_m   Σ_c softmax(z_m/τ_m) · (log softmax(z_m/τ_m) − log softmax(z_s/τ_m))
    loss   exp(ℓ_s) · CE(z_s, t) + Σ_m active_m · g_m · r_m · τ_m² · KL_m

The method is that of Sarode et al., "Classroom-Inspired Multi-Mentor Distillation with Adaptive
Learning Strategies" (arXiv 2409.20237).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from classroomkd.loss.classroom_report import ClassroomReport, RowReport
from classroomkd.loss.derivative import OnceDifferentiable
from classroomkd.loss.inputs import loss_options
from classroomkd.loss.options import LossOptions
from classroomkd.loss.rows import LossWeights, Rows, as_rows, weighted
from classroomkd.loss.signatures import loss_function
from classroomkd.loss.targets import Target, prepare_targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MIN_TAU = 1e-20  # above 0 also where float32 would round to it; softmax picks a class by then


@loss_function
def classroom_loss(
    student_logits: Tensor,
    mentor_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
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
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    process_group: ProcessGroup | None = None,
    return_report: bool | Literal["rows"] = False,
) -> Tensor | tuple[Tensor, ClassroomReport | RowReport]:
    """ClassroomKD's multi-mentor distillation loss, by definition.

    Args:
        student_logits: [B, C], or [B, C, d₁, …], of which every position is a row; float16,
            bfloat16, float32 or float64. Only it gets a gradient.
        mentor_logits: [M, B, C, …], or a sequence of M tensors of the student's shape, M ≥ 1, of
            any of these dtypes.
        targets: class indices [B, …], or class probabilities of the student's shape (taken to sum
            to 1, unchecked).
        temperature: softens the mentors' distributions; above 0 and at most 20, the limit of
            float32's precision. With "adaptive" mentoring τ goes from 1, for a mentor as confident
            as the student, to 1 + temperature, for one that is infinitely ahead.
        ranking: "sample" ranks by each row's own log-confidence (the paper), "batch" by its mean
            over the valid rows (the published implementation, with ``rank_decimals=2``).
        knowledge_filter: which mentors teach: "better", those whose rank is at least the student's;
            "correct", those whose largest logit is the target class's; "correct_and_better", both;
            "none", all.
        mentoring: how τ is chosen: "adaptive"; "fixed" uses ``temperature`` itself; "none" uses 1;
            "dtkd" gives student and mentor each their own (Dynamic Temperature Knowledge
            Distillation).
        weighting: "rank" weights a mentor's term by r_m, "uniform" by 1, "confidence" by
            w_m = (1 − exp(−ℓ_m) / Σ_j exp(−ℓ_j)) / (M − 1) over the mentors j, or 1 for M = 1
            (Zhang, Chen, Wang: *Confidence-Aware Multi-Teacher Knowledge Distillation*).
        task_weight: weight of the cross-entropy: "confidence", exp(ℓ_s), or a number ≥ 0.
        rank_decimals: if given, exp(ℓ_k) / Σ_j exp(ℓ_j) is rounded to so many decimals first.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.
        ignore_index: rows with this class index count nowhere.
        mentor_weight: g_m: a number ≥ 0 for all mentors, a tensor [M] on the logits' device, one
            for each, or "auto", `automatic_mentor_weight` of C and M; None is 1.
        class_weight: [C] ≥ 0, as `cross_entropy` takes it.
        row_weight: [B] (or [B, d₁, …]) ≥ 0. A row's whole loss is multiplied by its own weight and
            by its class's (Σ_c t_c times the weight of c, before smoothing), and the mean divides
            by the sum of these products. The report stays that of unweighted rows.
        reduction: "mean" over the valid rows, "sum", or "none".
        process_group: with ranking "batch", average over the valid rows of all its processes.
        return_report: also return a `ClassroomReport`; with "rows" a `RowReport`, which says of
            every row what each mentor did.

    Returns:
        The loss, 0-d, or [B, …] with ``reduction="none"``, in float32 (float64 if the student's or
        a mentor's logits are); with ``return_report`` the pair (loss, report). A second derivative
        raises RuntimeError.

    Raises:
        ValueError: no mentor; shapes or devices that do not agree; an option out of its range;
            on the CPU, a class index outside 0 … C − 1 (elsewhere, and under torch.compile, its
            row becomes NaN).
        TypeError: integer logits, floating-point class indices, or something not a tensor.

    """
    options, of_mentors = loss_options(
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
    weights = LossWeights(of_mentors, class_weight, row_weight)
    rows = as_rows(student_logits, mentor_logits, targets, weights, options).flat()
    report: ClassroomReport | RowReport | None
    loss, report = loss_by_definition(
        *rows[:4], of_mentors, options, return_report is True, process_group
    )
    if return_report == "rows":
        report = row_report(rows, options, process_group)
    loss = loss.reshape(rows.shape) if reduction == "none" else loss
    return loss if report is None else (loss, report)


class Weights(NamedTuple):
    """The first half's result: constants to the derivative."""

    log_confidence: Tensor  # [1 + M, B], ℓ, the student's first
    rank: Tensor  # [M, B], r_m
    active: Tensor  # [M, B] bool
    mentor_temperature: Tensor  # [M, B], τ_m
    student_temperature: Tensor  # [M, B], τ_m, or T_s with mentoring "dtkd"
    task: Tensor  # [B], a_s
    nonfinite: Tensor  # [B] bool: a NaN or +inf somewhere, or a target that names no class


def loss_by_definition(
    student_logits: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
    mentor_weight: Tensor | None,
    options: LossOptions,
    return_report: bool,
    process_group: ProcessGroup | None = None,
    ell_sums: Tensor | None = None,
) -> tuple[Tensor, ClassroomReport | None]:
    """`classroom_loss` of checked rows [N, C]: the loss, and the report if it is wanted.

    ``ell_sums``, for ranking "batch", are the sums over a larger batch; see `rank_and_filter`.
    """
    target, student, stacked = _prepared(
        OnceDifferentiable.apply(student_logits), mentors, targets, options
    )
    weights = classroom_weights(student.detach(), stacked, target, options, process_group, ell_sums)
    rows = weighted_row_loss(student, stacked, target, weights, mentor_weight, options)
    n_valid = target.valid.sum().clamp_min(1)
    loss = rows.loss
    if row_weight is not None:
        loss = weighted(loss, row_weight, options.reduction)
    elif options.reduction != "none":
        loss = loss.sum() if options.reduction == "sum" else loss.sum() / n_valid
    return loss, _report(weights, rows, target.valid, n_valid) if return_report else None


def _prepared(
    student_logits: Tensor, mentors: list[Tensor], targets: Tensor, options: LossOptions
) -> tuple[Target, Tensor, Tensor]:
    """Targets, student [N, C] and mentors [M, N, C] in one precision, 0 where rows do not count."""
    dtype = torch.float32
    for logits in (student_logits, *mentors):
        dtype = torch.promote_types(dtype, logits.dtype)
    target = prepare_targets(targets, student_logits.shape[1], options, dtype)
    # A row that does not count may hold anything, also NaN, and must not reach a product.
    counts = target.valid[:, None]
    student = torch.where(counts, student_logits.to(dtype), 0)
    stacked = torch.stack([mentor.detach().to(dtype) for mentor in mentors])
    return target, student, torch.where(counts, stacked, 0)


def row_report(
    rows: Rows, options: LossOptions, process_group: ProcessGroup | None = None
) -> RowReport:
    """Which mentors teach which rows."""
    rows = rows.flat()
    with torch.no_grad():
        target, student, mentors = _prepared(rows.student, rows.mentors, rows.targets, options)
        weights = classroom_weights(student, mentors, target, options, process_group)
    shape = (len(mentors), *rows.shape)
    return RowReport(
        weights.active.reshape(shape),
        torch.where(target.valid, weights.rank, 0).reshape(shape),
        torch.where(target.valid, weights.mentor_temperature, 0).reshape(shape),
    )


def loss_and_grad_by_definition(
    student_logits: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    row_weight: Tensor | None,
    mentor_weight: Tensor | None,
    scale: Tensor | None,
    options: LossOptions,
    return_report: bool,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, ClassroomReport | None]:
    """`loss_by_definition` and its gradient, times ``scale`` and in the student's dtype."""
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    with torch.enable_grad():
        student = student_logits.detach().to(precise, copy=True).requires_grad_()
        loss, report = loss_by_definition(
            student,
            mentors,
            targets,
            row_weight,
            mentor_weight,
            options,
            return_report,
            process_group,
        )
    (grad,) = torch.autograd.grad(loss, student)
    if scale is not None:
        grad = grad * scale.reshape(()).to(precise)
    return loss.detach(), grad.to(student_logits.dtype), report


def classroom_weights(
    student: Tensor,
    mentors: Tensor,
    target: Target,
    options: LossOptions,
    process_group: ProcessGroup | None = None,
    ell_sums: Tensor | None = None,
) -> Weights:
    """First half: rank everyone; choose the mentors that teach, and their temperatures.

    Args:
        student: [B, C]; mentors: [M, B, C]; both of one dtype, without gradient, 0 where the row
            does not count.

    """
    ell, correct = confidence_and_correctness(torch.cat([student[None], mentors]), target)
    ranking = rank_and_filter(ell, correct[1:], target.valid, options, process_group, ell_sums)
    tau_m, tau_s = (
        tau.clamp_min(_MIN_TAU) for tau in _temperatures(student, mentors, ranking.lead, options)
    )
    ell_s = ranking.log_confidence[0]
    if options.fixed_task_weight is None:
        task = ell_s.exp()
    else:
        task = torch.full_like(ell_s, options.fixed_task_weight)
    nonfinite = (target.out_of_range | ranking.nonfinite) & target.valid
    return Weights(
        ranking.log_confidence, ranking.rank, ranking.active, tau_m, tau_s, task, nonfinite
    )


def confidence_and_correctness(logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Of logits [..., B, C], each [..., B]: ℓ, and whether no logit exceeds the target class's."""
    index = target.class_index[:, None].expand(*logits.shape[:-1], 1)
    correct = logits.gather(-1, index).squeeze(-1) == logits.amax(-1)
    return target.expectation(log_softmax(logits, dim=-1)), correct


def confidence_sums(ell: Tensor, valid: Tensor) -> Tensor:
    """[M + 2]: the sums over the valid rows of ell [1 + M, B], and the number of these rows.

    A log-confidence of −inf counts as the smallest there is.
    """
    ell = ell.clamp_min(torch.finfo(ell.dtype).min)
    return torch.cat([torch.where(valid, ell, 0).sum(1), valid.sum(0, keepdim=True)])


class Ranking(NamedTuple):
    """Ranks of all networks, and which mentors teach."""

    log_confidence: Tensor  # [1 + M, B], the ℓ that ranks are made of
    rank: Tensor  # [M, B], r_m
    lead: Tensor  # [M, B], Δ_m
    active: Tensor  # [M, B] bool
    nonfinite: Tensor  # [B] bool: a log-confidence is NaN


def rank_and_filter(
    ell: Tensor,
    correct: Tensor,
    valid: Tensor,
    options: LossOptions,
    process_group: ProcessGroup | None = None,
    ell_sums: Tensor | None = None,
) -> Ranking:
    """Rank by log-confidences, and choose the mentors that teach.

    Args:
        ell: [1 + M, B], the student's first; correct: [M, B] bool, of the mentors; valid: [B] bool.
        ell_sums: for ranking "batch", `confidence_sums` of all rows where these are a part of them.

    """
    n_mentors = len(correct)
    nonfinite = ell.isnan().any(0)
    # A confidence of exactly 0 becomes the smallest there is: equal to another 0, and never
    # −inf − −inf.
    floor = torch.finfo(ell.dtype).min
    ell = ell.clamp_min(floor)
    if options.ranking == "batch":
        if ell_sums is None:
            ell_sums = confidence_sums(ell, valid)
            if process_group is not None:
                torch.distributed.all_reduce(ell_sums, group=process_group)
        mean = ell_sums[:-1, None] / ell_sums[-1].clamp_min(1)
        ell = mean.clamp_min(floor).expand_as(ell)
        nonfinite = nonfinite | mean.isnan().any()

    share = torch.softmax(ell, dim=0)
    if options.rank_decimals is not None:
        share = share.round(decimals=options.rank_decimals)
    r_s, r_m = n_mentors * share[0], n_mentors * share[1:]

    if options.rank_decimals is None:
        better = ell[1:] >= ell[0]
        lead = -torch.expm1(-(ell[1:] - ell[0]).abs())
    else:
        better = r_m >= r_s
        largest = torch.maximum(r_m, r_s)
        lead = torch.where(largest > 0, (r_m - r_s).abs() / largest, 0)
    active = {
        "better": better,
        "correct": correct,
        "correct_and_better": better & correct,
        "none": torch.ones_like(better),
    }[options.knowledge_filter]
    return Ranking(ell, r_m, lead, active & valid, nonfinite)


def _temperatures(
    student: Tensor, mentors: Tensor, lead: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Temperatures [M, B] of the mentors' and of the student's softmax."""
    if options.mentoring == "dtkd":
        x_s, x_m = student.amax(-1), mentors.amax(-1)
        both_positive = (x_s > 0) & (x_m > 0)
        # Of 2 · T · x_m / (x_s + x_m) the sum may be beyond float32, and its half may be 0.
        tau_m = 2 * options.temperature / (1 + x_s / x_m)
        tau_s = 2 * options.temperature / (1 + x_m / x_s)
        tau_m = torch.where(both_positive, tau_m, options.temperature)
        tau_s = torch.where(both_positive, tau_s, options.temperature)
        return tau_m, tau_s
    tau = {
        "adaptive": 1 + options.temperature * lead,
        "fixed": torch.full_like(lead, options.temperature),
        "none": torch.ones_like(lead),
    }[options.mentoring]
    return tau, tau


class RowLosses(NamedTuple):
    """The second half's result, 0 in rows that do not count."""

    loss: Tensor  # [B]
    cross_entropy: Tensor  # [B], unweighted
    mentor_loss: Tensor  # [B], Σ_m active_m · g_m · r_m · τ_m² · KL_m
    kl: Tensor  # [M, B], KL_m, of inactive mentors too


def weighted_row_loss(
    student: Tensor,
    mentors: Tensor,
    target: Target,
    weights: Weights,
    mentor_weight: Tensor | None,
    options: LossOptions,
) -> RowLosses:
    """Second half: each row's loss given the weights, differentiable in the student.

    Args:
        student: [B, C]; mentors: [M, B, C]; as for `classroom_weights`, the student with gradient.

    """
    # In a nonfinite row the gradient must be NaN too, whatever the selections below leave of it.
    student = student * torch.where(weights.nonfinite, torch.nan, 1.0).to(student.dtype)[:, None]
    cross_entropy = -target.expectation(log_softmax(student, dim=-1))
    task_loss = torch.where(weights.task == 0, 0, weights.task * cross_entropy)

    # With e = exp(u), KL is Σ e_m (u_m − u_s) / Σ e_m − log(Σ e_m / Σ e_s). Where the softmaxes are
    # nearly equal, as at high temperatures, the logarithm is of a number near 1: nothing cancels.
    u_m = _softened(mentors, weights.mentor_temperature)
    u_s = _softened(student, weights.student_temperature)
    e_m, e_s = u_m.exp(), u_s.exp()
    sum_m, sum_s = e_m.sum(-1), e_s.sum(-1)
    cross = torch.where(e_m > 0, e_m * (u_m - u_s), 0).sum(-1)
    kl = cross / sum_m - (sum_m / sum_s).log()  # [M, B]
    kl = kl - kl.detach().clamp_max(0)  # rounding must not make it negative

    weight = weights.mentor_temperature * weights.student_temperature
    if options.weighting == "rank":
        weight = weight * weights.rank
    elif options.weighting == "confidence" and len(mentors) > 1:
        weight = weight * (1 - torch.softmax(-weights.log_confidence[1:], 0)) / (len(mentors) - 1)
    if mentor_weight is not None:
        weight = weight * mentor_weight.detach().to(weight.dtype)[:, None]
    if options.mentor_weight is not None:
        weight = weight * options.mentor_weight_for(student.shape[1], len(mentors))
    # A weight of 0 makes the term 0 however infinite KL is, as it does with the cross-entropy.
    mentor_loss = torch.where(weights.active & (weight != 0), weight * kl, 0).sum(0)

    loss = torch.where(weights.nonfinite, torch.nan, task_loss + mentor_loss)
    mentor_loss = torch.where(weights.nonfinite, torch.nan, mentor_loss)
    return RowLosses(
        torch.where(target.valid, loss, 0),
        torch.where(target.valid, cross_entropy, 0),
        torch.where(target.valid, mentor_loss, 0),
        kl,
    )


def _softened(logits: Tensor, temperature: Tensor) -> Tensor:
    """(z − max z)/τ [M, B, C], which has the softmax of z/τ and is never +inf."""
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    return shifted / temperature[..., None]


def _report(weights: Weights, rows: RowLosses, valid: Tensor, n_valid: Tensor) -> ClassroomReport:
    kl = rows.kl.detach()
    n_active = weights.active.sum(1)
    return ClassroomReport(
        active_share=n_active.to(kl.dtype) / n_valid,
        rank_weight=torch.where(valid, weights.rank, 0).sum(1) / n_valid,
        temperature=torch.where(valid, weights.mentor_temperature, 0).sum(1) / n_valid,
        kl=torch.where(weights.active, kl, 0).sum(1) / n_active.clamp_min(1),
        student_confidence=torch.where(valid, weights.log_confidence[0].exp(), 0).sum() / n_valid,
        task_loss=rows.cross_entropy.detach().sum() / n_valid,
        mentor_loss=rows.mentor_loss.detach().sum() / n_valid,
    )
