"""Faults put into trained mentors are found, and healthy ones raise no alarm."""

import copy

import pytest
import torch
from torch import nn

from classroomkd.data import digits
from classroomkd.training.mentor_check import (
    NORMALISATIONS,
    CheckedMentor,
    check_logits,
    check_mentors,
)

OWN = NORMALISATIONS["ImageNet's"]
SEEDS = range(5)
N_IMAGES = (100, 200, 400)


def network(width, normed, seed):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d if normed else nn.Identity
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


MENTORS = {"normed": (16, True, 60), "plain": (24, False, 120), "weak": (8, True, 12)}
"""Width, batch norm or not, and steps of training; the weak one is right in half the images."""


@pytest.fixture(scope="module")
def images():
    """Training and held-out digits, from 0 to 1, and their classes."""
    parts = []
    for part in digits():
        pixels = torch.from_numpy(part.images).permute(0, 3, 1, 2).float() / 255
        parts.append((pixels, torch.from_numpy(part.targets).long()))
    return parts


@pytest.fixture(scope="module")
def trained(images):
    """Every mentor with every seed."""
    (train, targets), _ = images
    mean, std = (torch.tensor(of)[:, None, None] for of in OWN)
    train = (train - mean) / std
    networks = {}
    for seed in SEEDS:
        for name, (width, normed, steps) in MENTORS.items():
            net = network(width, normed, seed)
            optimizer = torch.optim.Adam(net.parameters(), 5e-3)
            for _ in range(steps):
                chosen = torch.randint(len(train), (64,))
                loss = nn.functional.cross_entropy(net(train[chosen]), targets[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            networks[name, seed] = net.eval()
    return networks


class Around(nn.Module):
    """A network with something done to its answers."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x):
        return self.change(self.inner(x))


def shuffled(net, seed):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    return Around(net, lambda z: z[:, order])


def swapped(net, seed):
    order = torch.arange(10)
    a, b = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:2]
    order[a], order[b] = b.item(), a.item()
    return Around(net, lambda z: z[:, order])


def broken(net, seed):
    net = copy.deepcopy(net)
    with torch.no_grad():
        net[-1].weight[seed] = torch.nan
    return net


FAULTS = {
    "classes shuffled": (shuffled, "another order"),
    "two classes swapped": (swapped, "another order"),
    "NaN in a weight": (broken, "NaN"),
    "one answer to all": (
        lambda net, _: Around(net, lambda z: 0 * z + torch.arange(10.0)),
        "the same answer",
    ),
    "softmax at its end": (lambda net, _: nn.Sequential(net, nn.Softmax(1)), "probabilities"),
    "logits times 100": (lambda net, _: Around(net, lambda z: 100 * z), "too large"),
    "logits times 1/100": (lambda net, _: Around(net, lambda z: z / 100), "too small"),
    "first weights": (lambda net, seed: network(16, True, 100 + seed).eval(), "near chance"),
    "training mode": (lambda net, _: copy.deepcopy(net).train(), "evaluation mode"),
}


NORMS = {
    "values from 0 to 255": NORMALISATIONS["0 to 255"],
    "values from 0 to 1": NORMALISATIONS["0 to 1"],
    "values from -1 to 1": NORMALISATIONS["-1 to 1"],
}


def sample(images, n, seed):
    _, (pixels, targets) = images
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:n]
    return pixels[chosen], targets[chosen]


def checked(trained, images, n, seed, **instead):
    """The checks of all mentors of a seed, by name, one of them replaced."""
    mentors = {name: CheckedMentor(trained[name, seed], *OWN) for name in MENTORS} | instead
    checks = check_mentors(mentors, *sample(images, n, seed), [f"digit {c}" for c in range(10)])
    return {check.name: check for check in checks}


@pytest.mark.parametrize("n", N_IMAGES)
def test_no_false_alarm(trained, images, n):
    for seed in SEEDS:
        for check in checked(trained, images, n, seed).values():
            assert not check.findings, check
            assert check.n_rows == n
            right = trained[check.name, seed](
                (sample(images, n, seed)[0] - torch.tensor(OWN[0])[:, None, None])
                / torch.tensor(OWN[1])[:, None, None]
            )
            right = right.argmax(1) == sample(images, n, seed)[1]
            assert check.top1 == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", MENTORS)
def test_faults_are_found(trained, images, name, fault):
    """In all five seeds where the fault can be seen in 400 images, and in no other mentor."""
    make, text = FAULTS[fault]
    found = 0
    for seed in SEEDS:
        sick = CheckedMentor(make(trained[name, seed], seed), *OWN)
        checks = checked(trained, images, 400, seed, **{name: sick})
        found += text in str(checks.pop(name))
        assert not any(check.findings for check in checks.values())
    # Right in half the images, a mentor of 400 shows no swap of two classes beyond chance; nor does
    # a network without batch norm have a training mode.
    expected = {("weak", "two classes swapped"): 1, ("weak", "logits times 100"): 4}
    expected["plain", "training mode"] = 0
    assert found >= expected.get((name, fault), 5 if fault != "first weights" else 4)


@pytest.mark.parametrize("given", NORMS)
def test_normalisations_are_found(trained, images, given):
    """With a batch norm, a network that was given another normalisation is found in every seed."""
    for seed in SEEDS:
        before = trained["normed", seed]
        (check,) = check_mentors(
            {"normed": CheckedMentor(before, *NORMS[given])}, *sample(images, 400, seed)
        )
        right = checked(trained, images, 400, seed)["normed"].top1
        lost = right - check.top1 > 0.1
        assert ("another normalisation suits it" in str(check)) == lost
        if lost:  # by ImageNet's or one close to it
            found = float(str(check).partition(" as it is, ")[2].partition("%")[0]) / 100
            assert found == pytest.approx(right, abs=0.05)


def test_the_order_is_named(trained, images):
    """A swap of two classes is told by the classes' names."""
    sick = CheckedMentor(swapped(trained["plain", 0], 0), *OWN)
    order = sick.network(torch.zeros(1, 3, 8, 8)).argsort()  # any call: it must not raise
    assert order.shape == (1, 10)
    a, b = sorted(torch.randperm(10, generator=torch.Generator().manual_seed(0))[:2].tolist())
    text = str(checked(trained, images, 400, 0, plain=sick)["plain"])
    assert f"digit {a} is its output {b} instead of {a}" in text
    assert f"digit {b} is its output {a} instead of {b}" in text


def test_same_answers(trained, images):
    twin = CheckedMentor(trained["plain", 0], *OWN)
    assert "the same answers as plain" in str(checked(trained, images, 100, 0, twin=twin)["twin"])


def test_logits_of_tokens():
    """Language models: no images, logits of tokens whose next token is known."""
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(50, (2000,), generator=rng)
    logits = torch.randn(2000, 50, generator=rng)
    logits[torch.arange(2000), targets] += 3
    order = torch.randperm(50, generator=rng)
    fine, shuffled_one = check_logits({"fine": logits, "shuffled": logits[:, order]}, targets)
    assert not fine.findings
    assert "another order" in str(shuffled_one)
    assert "(4" in str(shuffled_one) or "(5" in str(shuffled_one)  # nearly all 50 moved
