"""How large the gradient of the mentor terms is compared with that of cross-entropy.

    python benchmarks/gradients.py --out OUT

Trains strong and weak mentors and a student on clusters of points in C classes. Records the norm of
the mentor terms' gradient divided by that of cross-entropy, both with respect to the student's
parameters: before its first step for every C, M and temperature, and during its training with
cross-entropy. Two variants leave out one factor of a term: the rank weights
(``weighting="uniform"``), and the temperatures with their square (``mentoring="none"``).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from classroomkd import classroom_loss
from measure import environment, write_json

CLASSES = (5, 10, 20, 100, 1000)
MENTORS = (1, 3, 6)
TEMPERATURES = (1.0, 4.0, 12.0)
STEPS = (0, 10, 30, 100, 300, 1000)
# Spread of the cluster centres in standard deviations of a cluster. It grows with the number of
# classes so that mentors are about equally accurate.
SPREAD = {5: 0.3, 10: 0.33, 20: 0.36, 100: 0.42, 1000: 0.5}
DIMENSIONS = 64
POINTS = 8192
BATCH = 512
# → hidden units, training steps
STRENGTHS = {"strong": (256, 2000), "weak": (32, 60)}
LEFT_OUT: dict[str, dict[str, str]] = {
    "nothing": {},
    "rank weights": {"weighting": "uniform"},
    "temperatures": {"mentoring": "none"},
}


def clusters(n_classes: int) -> tuple[Tensor, Tensor]:
    """Points [POINTS, DIMENSIONS] around one centre per class, and their classes."""
    generator = torch.Generator().manual_seed(n_classes)
    centres = SPREAD[n_classes] * torch.randn(n_classes, DIMENSIONS, generator=generator)
    targets = torch.randint(n_classes, (POINTS,), generator=generator)
    return centres[targets] + torch.randn(POINTS, DIMENSIONS, generator=generator), targets


def network(hidden: int, n_classes: int, seed: int) -> nn.Module:
    """Two linear layers with PyTorch's default initialisation."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(DIMENSIONS, hidden), nn.ReLU(), nn.Linear(hidden, n_classes))


def train(model: nn.Module, points: Tensor, targets: Tensor, seed: int) -> Iterator[int]:
    """Train with cross-entropy; yields the number of each step before taking it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for step in itertools.count():
        yield step
        batch = torch.randint(len(points), (128,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(points[batch]), targets[batch]).backward()
        optimizer.step()


def norm(loss: Tensor, model: nn.Module) -> float:
    """The norm of the gradient with respect to all parameters."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def measure(n_classes: int) -> Iterator[dict[str, object]]:
    """The rows for one number of classes."""
    points, targets = clusters(n_classes)
    sample, classes = points[:BATCH], targets[:BATCH]
    mentors: dict[str, list[Tensor]] = {}
    for strength, (hidden, steps) in STRENGTHS.items():
        mentors[strength] = []
        for seed in range(max(MENTORS)):
            model = network(hidden, n_classes, seed)
            for step in train(model, points, targets, seed):
                if step == steps:
                    break
            mentors[strength].append(model(sample).detach())
    student = network(64, n_classes, seed=1000)
    for step in train(student, points, targets, seed=1000):
        if step in STEPS:
            task = norm(cross_entropy(student(sample), classes), student)
            for strength, m, temperature, (left_out, options) in itertools.product(
                STRENGTHS, MENTORS, TEMPERATURES if step == 0 else (12.0,), LEFT_OUT.items()
            ):
                logits = mentors[strength][:m]
                top1 = [(z.argmax(1) == classes).double().mean().item() for z in logits]
                loss = classroom_loss(
                    student(sample),
                    logits,
                    classes,
                    temperature=temperature,
                    task_weight=0.0,
                    **options,
                )
                yield {
                    "classes": n_classes,
                    "mentors": m,
                    "strength": strength,
                    "mentors_top1": sum(top1) / m,
                    "temperature": temperature,
                    "left_out": left_out,
                    "step": step,
                    "task_norm": task,
                    "times_task": norm(loss, student) / task,
                }
        if step == max(STEPS):
            return


def main() -> None:
    """Measure all rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gradients.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for c in track(CLASSES, "classes") for row in measure(c)]
    record = {"benchmark": "gradients", "environment": environment(), "rows": rows}
    write_json(arguments.out, "gradients", record)


if __name__ == "__main__":
    main()
