"""Implementations to compare the fused loss with, as functions of (student, mentors, targets).

They have the default options of the loss except for the ranking, and take class indices only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

TEMPERATURE = 12.0


def per_mentor_loop(
    student: Tensor, mentors: list[Tensor], targets: Tensor, ranking: str
) -> Tensor:
    """One mentor after another, with values read back for the log, as such code usually is."""
    student = student.float()

    def confidence(logits: Tensor) -> Tensor:
        log_p = log_softmax(logits.float(), dim=1).gather(1, targets[:, None]).squeeze(1)
        return (log_p.mean() if ranking == "batch" else log_p).exp()

    with torch.no_grad():
        confidences = torch.stack([confidence(logits) for logits in (student, *mentors)])
        ranks = len(mentors) * confidences / confidences.sum(0)
    loss = (confidences[0] * cross_entropy(student, targets, reduction="none")).mean()
    log = {"task": loss.item()}  # a training loop would print it
    for index, mentor in enumerate(mentors):
        rank = ranks[1 + index]
        active = rank >= ranks[0]
        if not active.any().item():
            continue
        lead = (rank - ranks[0]).abs() / torch.maximum(rank, ranks[0])
        tau = (1 + TEMPERATURE * lead).unsqueeze(-1)
        kl = kl_div(
            log_softmax(student / tau, dim=1),
            softmax(mentor.float() / tau, dim=1),
            reduction="none",
        ).sum(1)
        mentor_loss = (active * rank * tau.squeeze(-1) ** 2 * kl).mean()
        loss = loss + mentor_loss
        log[f"mentor {index}"] = mentor_loss.item()
    return loss


def liger_loss(student: Tensor, mentors: list[Tensor], targets: Tensor, ranking: str) -> Tensor:
    """The loss composed from one call of Liger's KL for all mentors."""
    from liger_kernel.transformers.functional import liger_kl_div

    return composed_loss(student, mentors, targets, ranking, liger_kl_div)


def composed_loss(
    student: Tensor,
    mentors: list[Tensor],
    targets: Tensor,
    ranking: str,
    kl: Callable[..., Tensor] = kl_div,
) -> Tensor:
    """The loss, in float32, from a KL function with the signature of `kl_div`."""
    student, stacked = student.float(), torch.stack([mentor.float() for mentor in mentors])
    ell = log_confidences(torch.cat([student.detach()[None], stacked]), targets)
    return composed_rows(student, stacked, targets, ranked(ell, ranking), kl).mean()


def log_confidences(everyone: Tensor, targets: Tensor) -> Tensor:
    """ℓ [K, B] of logits [K, B, C]."""
    repeated = targets.repeat(everyone.shape[0])
    return -cross_entropy(everyone.flatten(0, 1), repeated, reduction="none").view(
        everyone.shape[:2]
    )


def ranked(ell: Tensor, ranking: str) -> Tensor:
    """ℓ [K, B] as used by the ranking."""
    return ell.mean(1, keepdim=True).expand_as(ell) if ranking == "batch" else ell


def composed_rows(
    student: Tensor, mentors: Tensor, targets: Tensor, ell: Tensor, kl: Callable[..., Tensor]
) -> Tensor:
    """The loss per row [B] for student [B, C], mentors [M, B, C] and ranked ℓ [1 + M, B]."""
    rank = mentors.shape[0] * ell.softmax(0)[1:]
    tau = 1 - TEMPERATURE * torch.expm1(-(ell[1:] - ell[0]).abs())
    weight = torch.where(ell[1:] >= ell[0], rank * tau**2, 0)
    kls = kl(
        log_softmax(student / tau[..., None], dim=-1).flatten(0, 1),
        log_softmax(mentors / tau[..., None], dim=-1).flatten(0, 1),
        reduction="none",
        log_target=True,
    )
    kls = kls.sum(-1).view_as(weight)
    task = ell[0].exp() * cross_entropy(student, targets, reduction="none")
    return task + (weight * kls).sum(0)


def float64_loss_and_grad(
    student: Tensor, mentors: list[Tensor], targets: Tensor, ranking: str, chunk_bytes: int = 2**28
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference: loss 0-d, gradient [B, C] and active mentors [M, B], in chunks of rows.

    A chunk's logits take at most ``chunk_bytes`` in float64; the peak memory is about ten times
    that.
    """
    n_rows = student.shape[0]
    everyone = [student.detach(), *mentors]
    rows = max(1, chunk_bytes // (8 * len(everyone) * student.shape[1]))
    chunks = [slice(begin, begin + rows) for begin in range(0, n_rows, rows)]

    def logits(chunk: slice) -> Tensor:
        return torch.stack([one[chunk].double() for one in everyone])

    ell = torch.cat([log_confidences(logits(chunk), targets[chunk]) for chunk in chunks], dim=1)
    ell = ranked(ell, ranking)
    loss = torch.zeros((), dtype=torch.float64, device=student.device)
    grad = torch.empty(student.shape, dtype=torch.float64, device=student.device)
    for chunk in chunks:
        z = logits(chunk)
        own = z[0].requires_grad_()
        total = composed_rows(own, z[1:], targets[chunk], ell[:, chunk], kl_div).sum()
        (grad[chunk],) = torch.autograd.grad(total, own)
        loss += total.detach()
    return loss / n_rows, grad.div_(n_rows), ell[1:] >= ell[0]
