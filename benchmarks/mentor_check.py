"""Which faults of mentors `classroomkd check` finds, and how many images it needs.

    python benchmarks/mentor_check.py --out OUT

Trains three small networks on scikit-learn's handwritten digits with each of five seeds, puts each
fault into each of them, and checks it on increasing numbers of held-out images. Healthy networks
are checked too: any finding there is a false alarm.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from classroomkd.data import digits
from classroomkd.report.markup import markdown_table
from classroomkd.training.mentor_check import (
    NORMALISATIONS,
    CheckedMentor,
    MentorCheck,
    check_mentors,
)
from measure import environment, write_json

OWN = NORMALISATIONS["ImageNet's"]
SEEDS = range(5)
N_IMAGES = (25, 50, 100, 200, 400)
HARM = 0.1  # of the held-out images, which another normalisation must cost to count as a fault


class Kind(NamedTuple):
    """How a mentor is made."""

    width: int
    normed: bool  # has batch norms
    steps: int


MENTORS = {"normed": Kind(16, True, 60), "plain": Kind(24, False, 120), "weak": Kind(8, True, 12)}
"""The weak one is right in half the images."""


def network(kind: Kind, seed: int) -> nn.Sequential:
    """First weights for images [B, 3, 8, 8] of ten classes."""
    torch.manual_seed(seed)
    width, norm = kind.width, nn.BatchNorm2d if kind.normed else nn.Identity
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        norm(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


def images_and_classes() -> list[tuple[Tensor, Tensor]]:
    """Training and held-out digits [N, 3, 8, 8], from 0 to 1, and their classes [N]."""
    return [
        (
            torch.from_numpy(part.images).permute(0, 3, 1, 2).float() / 255,
            torch.from_numpy(part.targets).long(),
        )
        for part in digits()
    ]


def normalised(images: Tensor) -> Tensor:
    """Images as the mentors were trained on them."""
    mean, std = (torch.tensor(of)[:, None, None] for of in OWN)
    return (images - mean) / std


def trained(images: Tensor, targets: Tensor) -> dict[tuple[str, int], nn.Sequential]:
    """Every mentor with every seed, by its name and the seed."""
    networks = {}
    images = normalised(images)
    for seed in SEEDS:
        for name, kind in MENTORS.items():
            net = network(kind, seed)
            optimizer = torch.optim.Adam(net.parameters(), 5e-3)
            for _ in range(kind.steps):
                chosen = torch.randint(len(images), (64,))
                optimizer.zero_grad()
                cross_entropy(net(images[chosen]), targets[chosen]).backward()
                optimizer.step()
            networks[name, seed] = net.eval()
    return networks


class Around(nn.Module):
    """A network with something done to its answers."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10]."""
        return self.change(self.inner(x))


def order_of(seed: int) -> Tensor:
    """A random order of the ten classes."""
    return torch.randperm(10, generator=torch.Generator().manual_seed(seed))


def _shuffled(net: nn.Module, seed: int) -> nn.Module:
    order = order_of(seed)
    return Around(net, lambda z: z[:, order])


def swapped(net: nn.Module, seed: int) -> nn.Module:
    """The same network with the first two classes of `order_of` in each other's place."""
    order = torch.arange(10)
    a, b = order_of(seed)[:2].tolist()
    order[a], order[b] = b, a
    return Around(net, lambda z: z[:, order])


def _broken(net: nn.Module, seed: int) -> nn.Module:
    net = copy.deepcopy(net)
    with torch.no_grad():
        net[-1].weight[seed] = torch.nan
    return net


def _constant(net: nn.Module, _: int) -> nn.Module:
    return Around(net, lambda z: 0 * z + torch.arange(10.0))


# fault → how it is made of a network and a seed, what the finding says
FAULTS: dict[str, tuple[Callable[[nn.Module, int], nn.Module], str]] = {
    "classes shuffled": (_shuffled, "another order"),
    "two classes swapped": (swapped, "another order"),
    "NaN in a weight": (_broken, "NaN"),
    "one answer to all": (_constant, "the same answer"),
    "softmax at its end": (lambda net, _: nn.Sequential(net, nn.Softmax(1)), "probabilities"),
    "logits times 100": (lambda net, _: Around(net, lambda z: 100 * z), "too large"),
    "logits times 1/100": (lambda net, _: Around(net, lambda z: z / 100), "too small"),
    "first weights": (
        lambda net, seed: network(MENTORS["normed"], 100 + seed).eval(),
        "near chance",
    ),
    "training mode": (lambda net, _: copy.deepcopy(net).train(), "evaluation mode"),
}
# what an image normalised for ImageNet gets instead → its name among the usual ones
NORMS = {
    "values from 0 to 255": "0 to 255",
    "values from 0 to 1": "0 to 1",
    "values from -1 to 1": "-1 to 1",
}


def sample(images: Tensor, targets: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n`` of the images at random, and their classes."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    return images[chosen], targets[chosen]


def with_faults(healthy: nn.Module, seed: int) -> Iterator[tuple[str, CheckedMentor, str]]:
    """Every fault put into a network: its name, the mentor, and what the finding should say."""
    for fault, (make, text) in FAULTS.items():
        yield fault, CheckedMentor(make(healthy, seed), *OWN), text
    for fault, given in NORMS.items():
        yield fault, CheckedMentor(healthy, *NORMALISATIONS[given]), "another normalisation"


def is_harmed(name: str, fault: str, healthy: MentorCheck, sick: MentorCheck) -> bool:
    """Whether a fault changes anything: without batch norms there is no training mode."""
    if fault in NORMS:
        return healthy.top1 - sick.top1 > HARM
    return fault != "training mode" or MENTORS[name].normed


def measure(
    networks: dict[tuple[str, int], nn.Sequential], images: Tensor, targets: Tensor
) -> Iterator[dict[str, object]]:
    """A row for each mentor, seed and fault, or none: in which numbers of images it is found."""

    def look(mentor: CheckedMentor, n: int, seed: int) -> MentorCheck:
        return check_mentors({"mentor": mentor}, *sample(images, targets, n, seed))[0]

    for (name, seed), healthy in track(networks.items(), "mentors", total=len(networks)):
        row = {"mentor": name, "seed": seed}
        checks = [look(CheckedMentor(healthy, *OWN), n, seed) for n in N_IMAGES]
        alarms = {n: of.findings for n, of in zip(N_IMAGES, checks, strict=True) if of.findings}
        yield row | {"fault": None, "top1": checks[-1].top1, "alarms": alarms}
        for fault, mentor, text in with_faults(healthy, seed):
            found = [look(mentor, n, seed) for n in N_IMAGES]
            yield row | {
                "fault": fault,
                "harmed": is_harmed(name, fault, checks[-1], found[-1]),
                "found_in": [
                    n for n, of in zip(N_IMAGES, found, strict=True) if text in str(of.findings)
                ],
            }


def markdown(record: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a record, and what they show."""
    rows, sizes = record["rows"], record["images"]
    healthy = [row for row in rows if row["fault"] is None]
    seeds = len({row["seed"] for row in rows})
    yield (
        f"The smallest of {', '.join(map(str, sizes))} images with which a fault is found for all "
        f"{seeds} seeds; if there is none, the number of seeds for which {sizes[-1]} images "
        "suffice. Seeds for which a fault changes nothing (training mode without batch norms) or "
        f"costs at most {HARM:.0%} of the images (another normalisation) are left out; – means all."
    )
    names = list(dict.fromkeys(row["mentor"] for row in rows))
    faults = list(dict.fromkeys(row["fault"] for row in rows if row["fault"] is not None))
    yield markdown_table(
        ["fault", *(_described(name, healthy) for name in names)],
        [
            [
                fault,
                *(
                    _found([r for r in rows if (r["fault"], r["mentor"]) == (fault, name)], sizes)
                    for name in names
                ),
            ]
            for fault in faults
        ],
    )
    alarms = {n: sum(str(n) in row["alarms"] for row in healthy) for n in sizes}
    told = ", ".join(f"{count} with {n} images" for n, count in alarms.items())
    yield f"False alarms, of {len(healthy)} healthy mentors: {told}."


def _described(name: str, healthy: Sequence[Mapping[str, Any]]) -> str:
    tops = [100 * row["top1"] for row in healthy if row["mentor"] == name]
    kind = "batch norms" if MENTORS[name].normed else "no batch norms"
    return f"{name} ({kind}, top-1 {min(tops):.0f}–{max(tops):.0f} %)"


def _found(rows: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> str:
    """One cell: the fewest images that always suffice, or in how many seeds the most did."""
    harmed = [row for row in rows if row["harmed"]]
    enough = None
    for n in reversed(sizes):
        if not all(n in row["found_in"] for row in harmed):
            break
        enough = n
    if not harmed:
        return "–"
    of = f" ({len(harmed)} seeds)" * (len(harmed) < len(rows))
    if enough is None:
        return f"{sum(sizes[-1] in row['found_in'] for row in harmed)} of {len(harmed)}"
    return f"{enough}{of}"


def main() -> None:
    """Measure everything, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for mentor_check.json")
    out = parser.parse_args().out
    train, held_out = images_and_classes()
    rows = list(measure(trained(*train), *held_out))
    record = {"benchmark": "mentor_check", "environment": environment(), "rows": rows}
    write_json(out, "mentor_check", record | {"images": list(N_IMAGES)})


if __name__ == "__main__":
    main()
