"""Find faults in a mentor from its logits for a few hundred labelled images.

Each finding compares a number of correct predictions, or a magnitude, with what chance would give,
so that a healthy mentor, even a weak one, has no finding. Whatever is fitted (an order of the
classes, a normalisation) is fitted on one half of the images and evaluated on the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Channels = tuple[float, float, float]
NORMALISATIONS: dict[str, tuple[Channels, Channels]] = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100's": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "-1 to 1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0 to 1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "0 to 255": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
"""Means and standard deviations that networks are often trained with, of values from 0 to 1."""

_SIGMAS = 4.0  # beyond which a count is significant: 1 in 30,000
_ABOVE_CHANCE = 1.5  # times chance: the least accuracy of a trained mentor
_GAIN = 0.05  # of the images: the least gain from another order or normalisation
_BATCHED = 0.01  # of the logits' spread: the most that other images of a batch may change them
_SCALE = 16.0  # times too large or too small, by the most likely temperature


@dataclass
class MentorCheck:
    """One mentor's accuracy on labelled images, and the faults found."""

    name: str
    n_rows: int
    top1: float
    row: str = "image"  # the noun in messages
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"{self.name}: top-1 {self.top1:.1%} of {self.n_rows} {self.row}s"
        return "; ".join([line, *self.findings])


class CheckedMentor(NamedTuple):
    """A network to check, and the current normalisation of its images."""

    network: nn.Module
    mean: Channels | None = None
    std: Channels | None = None


def check_logits(
    logits: Mapping[str, Tensor],
    targets: Tensor,
    classes: Sequence[str] = (),
    *,
    row: str = "image",
) -> list[MentorCheck]:
    """Check mentors' logits [..., C] for rows with known class indices [...].

    A few hundred rows are enough; a wrong order of the C classes can only be found with several
    rows per class. For language models, rows are tokens. A `MentorCheck` prints as one line; its
    ``findings`` are empty if no fault was found.

    Args:
        logits: each mentor's, by its name, of any floating-point dtype.
        targets: class indices [...]; rows with -100 are ignored.
        classes: the classes' names, for the findings.
        row: the noun for a row in the findings.

    Returns:
        One check for each mentor, in their order.

    Raises:
        ValueError, TypeError: shapes do not agree, a target is no class, or no row is left.

    """
    if targets.is_floating_point():
        raise TypeError(f"targets must be class indices, got {targets.dtype}")
    for name, of in logits.items():
        if of.shape[:-1] != targets.shape:
            raise ValueError(
                f"the logits of {name} must be {[*targets.shape, 'C']}, as the targets are "
                f"{list(targets.shape)}, got {list(of.shape)}"
            )
    targets = targets.cpu().long()
    valid = targets != -100
    targets = targets[valid]
    if not len(targets):
        raise ValueError(f"there is no {row} to check: all targets are -100")
    answers = {name: of.detach().float().cpu()[valid] for name, of in logits.items()}
    for name, of in answers.items():
        if (wrong := targets[(targets < 0) | (targets >= of.shape[1])]).numel():
            raise ValueError(
                f"targets must be class indices from 0 to {of.shape[1] - 1}, as {name} has "
                f"{of.shape[1]} classes, or -100; got {int(wrong[0])}"
            )
        if classes and len(classes) != of.shape[1]:
            raise ValueError(f"classes must be the names of {of.shape[1]}, got {len(classes)}")
    checks = [_check(name, of, targets, classes, row) for name, of in answers.items()]
    _compare(checks, answers)
    return checks


@torch.no_grad()
def check_mentors(
    mentors: Mapping[str, CheckedMentor],
    images: Tensor,
    targets: Tensor,
    classes: Sequence[str] = (),
) -> list[MentorCheck]:
    """Check mentors on images, including other normalisations and other images in the batch.

    Args:
        mentors: by name; those with ``mean`` and ``std`` are also tried with other values of these.
        images: [N, 3, H, W] with values from 0 to 1, on the mentors' device; for a mentor without
            ``mean`` and ``std``, as it expects them.
        targets: class indices [N].
        classes: the classes' names.

    """
    inputs = {
        name: _normalised(images, mentor.mean, mentor.std) for name, mentor in mentors.items()
    }
    logits = {name: _answers(mentor.network, inputs[name]) for name, mentor in mentors.items()}
    checks = check_logits(logits, targets, classes)
    for check in checks:
        mentor, answers = mentors[check.name], logits[check.name]
        if not answers.isfinite().all():
            continue
        _check_batch(check, mentor.network, inputs[check.name], answers)
        if mentor.mean is not None and mentor.std is not None:
            _check_normalisation(check, mentor, images, targets.cpu(), answers)
    return checks


def _answers(network: nn.Module, images: Tensor, size: int = 128) -> Tensor:
    return torch.cat([network(part).float().cpu() for part in images.split(size)])


def _normalised(images: Tensor, mean: Channels | None, std: Channels | None) -> Tensor:
    if mean is None or std is None:
        return images
    centre, spread = (images.new_tensor(of)[:, None, None] for of in (mean, std))
    return (images - centre) / spread


def _check(
    name: str, logits: Tensor, targets: Tensor, classes: Sequence[str], row: str
) -> MentorCheck:
    n_rows, n_classes = logits.shape
    right = logits.argmax(1) == targets
    check = MentorCheck(name, n_rows, right.float().mean().item(), row)
    broken = (
        ~logits.isfinite().any(1) | logits.isnan().any(1) | (logits == torch.inf).any(1)
    ).sum()
    if broken:
        check.findings.append(
            f"NaN or infinity in its answers to {int(broken)} {row}s: weights or inputs are damaged"
        )
        return check
    spread = logits.std(0).mean() if n_rows > 1 else torch.tensor(1.0)
    if spread <= 1e-6 * logits.abs().mean().clamp_min(1e-12):
        check.findings.append(f"the same answer to every {row}: it cannot teach anything")
        return check
    probabilities = bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all())
    if probabilities:
        check.findings.append(
            "its answers are probabilities, not logits: remove the softmax at its end"
        )
    chance = _chance(targets, n_classes)
    deviation = math.sqrt(n_rows * chance * (1 - chance))
    if right.sum() <= max(n_rows * chance + 3 * deviation, _ABOVE_CHANCE * n_rows * chance):
        unsure = right.sum() > _ABOVE_CHANCE * n_rows * chance
        check.findings.append(
            f"near chance ({chance:.1%}): other classes or another order of them, another "
            f"normalisation, or not trained{f'; or too few {row}s to tell' * unsure}"
        )
    elif not probabilities:
        _check_scale(check, logits, targets)
    _check_order(check, logits, targets, classes)
    return check


def _chance(targets: Tensor, n_classes: int) -> float:
    """The highest accuracy of a network that always predicts one class."""
    return max(1 / n_classes, targets.bincount(minlength=n_classes).max().item() / len(targets))


def _check_order(
    check: MentorCheck, logits: Tensor, targets: Tensor, classes: Sequence[str]
) -> None:
    """Match outputs with classes on every second image of a class, and evaluate on the others."""
    from scipy.optimize import linear_sum_assignment

    fitted, counted = _halves(targets)
    n_classes = logits.shape[1]
    if not len(counted) or n_classes < 2:
        return
    log_p = torch.log_softmax(logits, 1).clamp_min(-20.0)
    score = torch.zeros(n_classes, n_classes).index_add_(0, targets[fitted], log_p[fitted])
    seen = targets[fitted].bincount(minlength=n_classes) > 0
    score[seen] /= targets[fitted].bincount(minlength=n_classes)[seen, None]
    score[~seen] = score[seen].mean()  # any remaining output
    score += 1e-4 * torch.eye(n_classes)  # of two orders that fit equally well, the given one
    _, output = linear_sum_assignment(score.numpy(), maximize=True)
    output = torch.from_numpy(output)
    answers = logits[counted].argmax(1)
    before, after = answers == targets[counted], answers == output[targets[counted]]
    moved = [c for c in range(n_classes) if seen[c] and output[c] != c]
    if moved and _is_better(before, after):
        called = [classes[c] if classes else f"class {c}" for c in moved[:3]]
        pairs = ", ".join(
            f"{name} is its output {int(output[c])} instead of {c}"
            for name, c in zip(called, moved, strict=False)
        )
        more = f", … ({len(moved)} classes)" if len(moved) > 3 else ""
        check.findings.append(
            f"its classes are in another order: {before.float().mean():.1%} as they are, "
            f"{after.float().mean():.1%} where {pairs}{more}: reorder its outputs"
        )


def _halves(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of every first and every second image of each class."""
    order = targets.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    first = torch.searchsorted(targets[order], targets)
    odd = (place - first) % 2 == 1
    return (~odd).nonzero().squeeze(1), odd.nonzero().squeeze(1)


def _is_better(before: Tensor, after: Tensor) -> bool:
    """Whether the second has significantly more correct predictions for the same images."""
    won, lost = (after & ~before).sum().item(), (before & ~after).sum().item()
    return won - lost > max(_SIGMAS * math.sqrt(won + lost), _GAIN * len(before))


def _check_batch(check: MentorCheck, network: nn.Module, images: Tensor, answers: Tensor) -> None:
    """Logits of the first images, in a batch with other images than before."""
    some = images[: max(2, min(16, len(images) // 2))]
    alone = _answers(network, some)
    changed = (alone - answers[: len(some)]).abs().max()
    spread = answers.std(0).mean()
    if changed > _BATCHED * spread:
        check.findings.append(
            "its answer to an image depends on the other images of the batch (by "
            f"{(changed / spread).item():.0%} of their spread): put it into evaluation mode, "
            "mentor.eval()"
        )


def _check_normalisation(
    check: MentorCheck, mentor: CheckedMentor, images: Tensor, targets: Tensor, answers: Tensor
) -> None:
    fitted, counted = _halves(targets)
    if not len(counted):
        return
    right = answers.argmax(1) == targets
    best, best_right = "", right
    for name, (mean, std) in NORMALISATIONS.items():
        others = _answers(mentor.network, _normalised(images[fitted], mean, std)).argmax(1)
        if (others == targets[fitted]).sum() > best_right[fitted].sum():
            best, best_right = name, torch.zeros_like(right)
            best_right[fitted] = others == targets[fitted]
    if not best:
        return
    mean, std = NORMALISATIONS[best]
    other = _answers(mentor.network, _normalised(images[counted], mean, std)).argmax(1)
    before, after = right[counted], other == targets[counted]
    if _is_better(before, after):
        check.findings.append(
            f"another normalisation suits it: {before.float().mean():.1%} as it is, "
            f"{after.float().mean():.1%} with {best}: mean={list(mean)} std={list(std)}"
        )


def _check_scale(check: MentorCheck, logits: Tensor, targets: Tensor) -> None:
    """Whether the temperature with the highest likelihood is far from 1."""
    temperatures = 2.0 ** torch.arange(-10.0, 11.0)
    losses = torch.stack([cross_entropy(logits / T, targets) for T in temperatures])
    best = temperatures[losses.argmin()].item()
    # If all predictions are correct, logits cannot be too large, only too small.
    confidence = torch.softmax(logits, 1).amax(1).mean().item()
    if best >= _SCALE or (best <= 1 / _SCALE and confidence < check.top1 / 2):
        how = "large" if best > 1 else "small"
        check.findings.append(
            f"its logits are about {max(best, 1 / best):.0f} times too {how} (confidence "
            f"{confidence:.0%}, right {check.top1:.0%}): temperatures act differently on it; "
            f"{'divide' if best > 1 else 'multiply'} them by that"
        )


def _compare(checks: Sequence[MentorCheck], logits: Mapping[str, Tensor]) -> None:
    """Faults that only a comparison with the other mentors shows."""
    for index, check in enumerate(checks):
        for other in checks[:index]:
            if torch.equal(logits[check.name], logits[other.name]):
                check.findings.append(f"the same answers as {other.name}: one of them is enough")
                break
