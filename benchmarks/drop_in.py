"""ClassroomLoss in a custom trainer: small networks on small sets, compared with cross-entropy.

    python benchmarks/drop_in.py --out OUT

Trains small students without a scheduler, on scikit-learn's digits and on drawn images, each with
cross-entropy, with KD from the best mentor, and with `ClassroomLoss` at several mentor weights.
Only the loss changes: the seed, initial weights, batches and learning rate are the same. The same
command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from classroomkd import ClassroomLoss
from classroomkd.loss import automatic_mentor_weight
from classroomkd.loss.methods import Outputs, create
from drawn import drawn
from measure import KeptRows

SEEDS = range(5)
BATCH = 32
PER_CLASS = {5: 60, 20: 40, 50: 30}  # classes → training images per class; 40 more are held out
# The two networks that the loss was first found to harm; measured with all losses.
FIRST = (("digits", "pooled"), ("digits", "plain"))
SETS = {"drawn 5": 5, "digits": 10, "drawn 20": 20, "drawn 50": 50}  # → classes
TOTAL_WEIGHTS = (0.75, 1.0, 2.0)  # of all mentors together
# Each mentor's training: its epochs as a multiple of the student's, and its share of the images.
STRENGTHS = {
    "pooled": ((3, 1.0), (2, 1.0), (0.8, 1.0), (3, 0.5), (2, 0.5), (3, 1.0)),
    "plain": ((3, 1.0), (2, 1.0), (0.3, 0.5), (2, 1.0), (1, 0.5), (0.5, 1.0)),
    "normed": ((2, 1.0), (1, 1.0), (0.5, 1.0), (2, 1.0), (1, 0.5), (0.3, 1.0)),
}
OPTIONS = ("mentor_weight", "temperature", "task_weight")
KEYS = ("set", "network", "mentors", "loss", *OPTIONS, "seed")

LossFunction = Callable[[Tensor, list[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Images:
    """Images float32 [N, D, H, W], their classes, and the indices of training and test images."""

    images: Tensor
    targets: Tensor
    train: Tensor
    test: Tensor

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.targets.max()) + 1


@cache
def images_of(name: str) -> Images:
    """The set called "digits", or "drawn N" with N classes."""
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return Images(images, torch.tensor(targets), order[:1198], order[1198:])
    n_classes = int(name.split()[1])
    count = PER_CLASS[n_classes]
    pixels, targets = drawn(n_classes, count + 40)
    images = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 128 - 1
    indices = torch.arange(len(images))
    held_out = n_classes * count  # classes alternate
    return Images(images, torch.tensor(targets), indices[:held_out], indices[held_out:])


def network(name: str, data: Images) -> nn.Module:
    """A small network with PyTorch's default initialisation.

    pooled: two convolutions and global pooling; plain: two convolutions and a linear layer over all
    positions; normed: three convolutions with batch norm and global pooling.
    """
    _, depth, side, _ = data.images.shape
    widths = {"pooled": (8, 16), "plain": (16, 32), "normed": (16, 32, 64)}[name]
    layers: list[nn.Module] = []
    for number, width in enumerate(widths):
        # For the 8×8 digits, plain and normed have one stride of 2 fewer than for 16×16 images.
        stride = 1 if name == "pooled" or (number == 0 and (name == "normed" or side == 8)) else 2
        layers.append(nn.Conv2d(depth, width, 3, padding=1, stride=stride))
        if name == "normed":
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU())
        if name == "pooled" and number == 0:
            layers.append(nn.MaxPool2d(2))
        side, depth = -(-side // stride), width
    if name == "plain":
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(depth * side**2, data.classes))
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(depth, data.classes))


def train(
    name: str,
    data: Images,
    epochs: int,
    seed: int,
    loss: LossFunction,
    mentors: Sequence[Tensor] = (),
    share: float = 1.0,
) -> nn.Module:
    """A network trained on a ``share`` of the training images; ``mentors`` are logits [N, C]."""
    torch.manual_seed(seed)
    model = network(name, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    indices = data.train[torch.randperm(len(data.train))][: round(share * len(data.train))]
    for _ in range(epochs):
        order = indices[torch.randperm(len(indices))]
        for begin in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[begin : begin + BATCH]
            logits = model(data.images[batch])
            optimizer.zero_grad()
            loss(logits, [of[batch] for of in mentors], data.targets[batch]).backward()
            optimizer.step()
    return model.eval()


def top1(model: nn.Module, data: Images, indices: Tensor) -> float:
    """Top-1 as a fraction, 0 to 1."""
    with torch.no_grad():
        correct = model(data.images[indices]).argmax(1) == data.targets[indices]
    return correct.double().mean().item()


def epochs_of(data: Images) -> int:
    """A student's epochs: 10, or as many as make about 190 steps for smaller sets."""
    return max(10, 6000 // len(data.train))


@cache
def mentor(name: str, set_name: str, number: int) -> tuple[Tensor, float]:
    """Logits for all images and top-1 of one of six mentors with the student's architecture."""
    data = images_of(set_name)
    times, share = STRENGTHS[name][number]
    epochs = max(1, round(times * epochs_of(data)))
    model = train(name, data, epochs, 100 + number, _cross_entropy, share=share)
    with torch.no_grad():
        return model(data.images), round(top1(model, data, data.test), 4)


def _cross_entropy(logits: Tensor, _: list[Tensor], targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets)


def loss_function(loss: str, options: dict[str, float | str]) -> LossFunction:
    """The loss function called ``loss``; ``options`` are those of `ClassroomLoss`."""
    if loss == "cross-entropy":
        return _cross_entropy
    if loss == "kd":
        kd = create("kd")
        return lambda logits, mentors, targets: kd(Outputs(logits), [Outputs(mentors[0])], targets)
    return ClassroomLoss(**options)


def plan() -> Iterator[dict[str, object]]:
    """The keys of each row to measure, the most important first."""

    def of(place: tuple[str, str], m: int, loss: str) -> Iterator[dict[str, object]]:
        for seed in SEEDS:
            yield dict(zip(KEYS, (*place, m, loss, None, None, None, seed), strict=True))

    def classroom(
        place: tuple[str, str],
        m: int,
        weight: float,
        temperature: float = 12.0,
        task_weight: float | str = "confidence",
    ) -> Iterator[dict[str, object]]:
        for row in of(place, m, "classroom"):
            yield row | dict(zip(OPTIONS, (weight, temperature, task_weight), strict=True))

    for place in FIRST:
        yield from of(place, 0, "cross-entropy")
        yield from of(place, 1, "kd")
        for weight in (1.0, 0.5, 0.3, 0.25, 0.2, 1 / 6, 0.1):
            yield from classroom(place, 3, weight)
        yield from classroom(place, 3, 1.0, temperature=4.0)
        yield from classroom(place, 3, 1 / 6, task_weight=1.0)
    groups = (("plain", 3), ("plain", 1), ("normed", 3), ("plain", 6), ("normed", 1), ("normed", 6))
    places = [(set_name, name, m) for name, m in groups for set_name in SETS]
    for set_name, name, m in places:
        yield from of((set_name, name), 0, "cross-entropy")
        yield from classroom((set_name, name), m, automatic_mentor_weight(SETS[set_name], m))
    for set_name, name, m in places:
        automatic = automatic_mentor_weight(SETS[set_name], m)
        yield from classroom((set_name, name), m, automatic, task_weight=1.0)
        for weight in sorted({1.0, *(min(1.0, total / m) for total in TOTAL_WEIGHTS)}):
            yield from classroom((set_name, name), m, weight)


def main() -> None:
    """Measure the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for drop_in.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = KeptRows(arguments.out, "drop_in", KEYS)
    wanted = {tuple(row.values()): row for row in plan()}
    missing = [row for row in wanted.values() if not kept.has(**row)]
    for row in track(missing, "students"):
        data = images_of(row["set"])
        mentors = [mentor(row["network"], row["set"], k) for k in range(row["mentors"])]
        loss = loss_function(row["loss"], {key: row[key] for key in OPTIONS})
        epochs = epochs_of(data)
        logits = [logits for logits, _ in mentors]
        model = train(row["network"], data, epochs, row["seed"], loss, logits)
        kept.add(
            row
            | {
                "classes": data.classes,
                "epochs": epochs,
                "mentors_top1": [accuracy for _, accuracy in mentors],
                "train_top1": round(top1(model, data, data.train), 4),
                "top1": round(top1(model, data, data.test), 4),
            }
        )


if __name__ == "__main__":
    main()
