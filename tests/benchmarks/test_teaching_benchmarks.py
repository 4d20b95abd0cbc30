"""The measurements of teaching compare like with like, go on where they stopped, and add up."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from classroomkd import classroom_loss

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import drop_in  # noqa: E402
import examples  # noqa: E402
import gradients  # noqa: E402
import measure  # noqa: E402
import small_data  # noqa: E402
import teaching  # noqa: E402
from drawn import drawn  # noqa: E402


def test_pictures_are_the_same_every_time_and_as_many_of_each_class():
    images, targets = drawn(5, 8)
    again, _ = drawn(5, 8)
    assert images.shape == (40, 16, 16, 3)
    assert (images == again).all()
    assert np.bincount(targets).tolist() == [8] * 5
    # Of one class they are alike: a class's mean picture is nearer to its own than another's.
    half = images.reshape(8, 5, -1).astype(float)
    first, second = half[:4].mean(0), half[4:].mean(0)
    distances = np.linalg.norm(first[:, None] - second[None], axis=2)
    assert (distances.argmin(1) == np.arange(5)).sum() >= 4


def test_rows_are_kept_as_they_come(tmp_path):
    kept = measure.KeptRows(tmp_path, "name", ("loss", "seed"))
    kept.add({"loss": "kd", "seed": 0, "top1": 0.5})
    again = measure.KeptRows(tmp_path, "name", ("loss", "seed"))
    assert again.has(loss="kd", seed=0)
    assert not again.has(loss="kd", seed=1)
    again.add({"loss": "kd", "seed": 1, "top1": 0.6})
    record = json.loads((tmp_path / "name.json").read_text())
    assert [row["seed"] for row in record["rows"]] == [0, 1]
    assert record["benchmark"] == "name"
    assert record["environment"].keys() >= {"date", "torch", "classroomkd"}


def test_the_ratio_of_gradients_is_that_of_the_two_losses(monkeypatch):
    monkeypatch.setattr(gradients, "STRENGTHS", {"strong": (16, 30)})
    monkeypatch.setattr(gradients, "STEPS", (0,))
    monkeypatch.setattr(gradients, "MENTORS", (1, 2))
    monkeypatch.setattr(gradients, "TEMPERATURES", (4.0,))
    rows = list(gradients.measure(5))
    assert len(rows) == 2 * 3
    points, targets = gradients.clusters(5)
    mentor = gradients.network(16, 5, 0)
    for step in gradients.train(mentor, points, targets, 0):
        if step == 30:
            break
    student = gradients.network(64, 5, 1000)
    points, targets = points[: gradients.BATCH], targets[: gradients.BATCH]
    logits = student(points).double()
    task = torch.autograd.grad(cross_entropy(logits, targets), logits)[0]
    both = [
        torch.autograd.grad(
            classroom_loss(
                student(points), [mentor(points).detach()], targets, temperature=4.0, task_weight=w
            ),
            list(student.parameters()),
        )
        for w in (0.0, 1.0)
    ]
    # What a task weight of 1 adds to the gradient is cross-entropy's.
    norms = [
        math.sqrt(sum(float((g.double() ** 2).sum()) for g in part))
        for part in (both[0], [b - a for a, b in zip(*both, strict=True)])
    ]
    (row,) = (r for r in rows if r["mentors"] == 1 and r["left_out"] == "nothing")
    assert task.shape == (gradients.BATCH, 5)
    assert row["times_task"] == pytest.approx(norms[0] / norms[1], rel=1e-3)


def test_only_the_loss_differs(tmp_path):
    """With mentors of no weight a classroom's student is the one of its task loss alone."""
    data = drop_in.images_of("digits")
    mentors = [torch.randn(len(data.images), 10) for _ in range(3)]
    seen = []

    def watched(loss):
        def call(logits, of_mentors, targets):
            seen.append((logits.detach().clone(), targets))
            return loss(logits, of_mentors, targets)

        return call

    for name in ("cross-entropy", "classroom"):
        loss = drop_in.loss_function(name, {"mentor_weight": 0.25})
        drop_in.train("plain", data, 1, 3, watched(loss), mentors, share=0.1)
    first, second = seen[0], seen[len(seen) // 2]
    assert len(seen) == 2 * 3  # of 120 images, 32 a step
    assert (first[0] == second[0]).all()
    assert all((a[1] == b[1]).all() for a, b in zip(seen[:3], seen[3:], strict=True))


@pytest.mark.parametrize("name", ["digits", "drawn 5"])
@pytest.mark.parametrize("network", ["pooled", "plain", "normed"])
def test_networks_fit_the_sets(network, name):
    data = drop_in.images_of(name)
    assert drop_in.network(network, data)(data.images[:4]).shape == (4, data.classes)
    assert not set(data.train.tolist()) & set(data.test.tolist())
    assert len(data.train) + len(data.test) == len(data.images)
    counts = data.targets[data.test].bincount(minlength=data.classes)
    assert counts.min() >= 40


@pytest.mark.parametrize(("name", "per_class"), [("digits", 40), ("drawn 5", 150)])
def test_parts_of_small_sets_share_no_image(name, per_class):
    train, validation, test = small_data.sets(name, per_class, None)
    n_classes = len(train.classes)
    assert np.bincount(train.targets).tolist() == [per_class] * n_classes
    assert np.bincount(validation.targets).tolist() == [20] * n_classes
    assert np.bincount(test.targets).tolist() == [40] * n_classes
    pictures = [{image.tobytes() for image in part.images} for part in (train, validation, test)]
    if name != "digits":  # where some are written alike
        assert not pictures[0] & (pictures[1] | pictures[2])
    assert sum(map(len, (train, validation, test))) == n_classes * (per_class + 60)


def test_photographs_of_the_first_classes_only(tmp_path):
    for part, count in (("train", 25), ("val", 3)):
        for c in range(11):
            folder = tmp_path / part / f"class {c:02}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((16, 16, 3), 20 * c + i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    train, validation, test = small_data.sets("photos 10", 5, tmp_path)
    assert train.classes == [f"class {c:02}" for c in range(10)]
    assert train.images[:, 0, 0, 0].tolist() == [
        20 * c + i for c in range(10) for i in range(20, 25)
    ]
    assert len(validation) == 10 * 20
    assert np.bincount(test.targets).tolist() == [3] * 10


def test_a_student_of_small_data_is_trained_as_train_does(tmp_path, monkeypatch):
    monkeypatch.setattr(small_data, "EPOCHS", 1)
    monkeypatch.setattr(small_data, "MENTORS", ("resnet8",))
    monkeypatch.setenv("CLASSROOMKD_CACHE", str(tmp_path / "cache"))
    values = ("drawn 5", 40, "resnet8", "classroom", 0.375, 1.0, 1)
    row = dict(zip(small_data.KEYS, values, strict=True))
    measured = small_data.measure(row, None, tmp_path)
    assert measured["classes"] == 5
    assert len(measured["mentors_top1"]) == 1
    assert 0 < measured["top1"] <= 1
    assert len(list((tmp_path / "cache/mentors").glob("*.safetensors"))) == 1
    config = (tmp_path / "run/config.yaml").read_text()
    assert "mentor_weight: 0.375" in config
    assert "task_weight: 1.0" in config


def made_up(method, weight, tops):
    return [
        {
            **{"set": "drawn 5", "images_per_class": 40, "student": "resnet8"},
            **{"method": method, "mentor_weight": weight, "seed": seed, "classes": 5},
            **{"validation_top1": top, "top1": top, "mentors_top1": [0.9, 0.9]},
            "task_weight": 1.0 if method == "classroom" else None,
        }
        for seed, top in enumerate(tops)
    ]


def test_the_interval_is_that_of_the_paired_differences():
    rows = made_up("alone", None, [0.5, 0.6, 0.7, 0.8, 0.9])
    rows += made_up("classroom", 1.0, [0.51, 0.62, 0.73, 0.84, 0.95])
    _, table = teaching.RECORDS["small_data"][2](rows)
    last = table.splitlines()[-1]
    # Differences of 1 to 5 points: mean 3, deviation √2.5, and t of 4 degrees of freedom 2.776.
    assert f"+3.00 ± {2.776 * math.sqrt(2.5 / 5):.2f}" in last
    assert last.split(" | ")[4] == "73.00 ± 17.39"


def test_the_dead_are_counted():
    rows = [
        {
            **{"set": "digits", "network": "plain", "mentors": m, "loss": loss},
            **{"mentor_weight": weight, "task_weight": "confidence", "temperature": 12.0},
            **{"seed": seed, "classes": 10},
            **{"top1": top, "train_top1": top, "mentors_top1": [0.9] * 3},
        }
        for m, loss, weight, tops in (
            (0, "cross-entropy", None, (0.9, 0.9)),
            (3, "classroom", 1.0, (0.1, 0.92)),
        )
        for seed, top in enumerate(tops)
    ]
    _, table = teaching.RECORDS["drop_in"][2](rows)
    cells = table.splitlines()[-1].split(" | ")
    assert cells[-2:] == ["1", "2 |"]
    assert cells[4] == "−39.00 ± 41.00"


def test_examples_are_read_as_they_print(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "FOLDER", tmp_path)
    (tmp_path / "one.py").write_text(
        "print('held-out perplexity: teacher 9.5, student alone 12.25, in the classroom 11.000')\n"
        "print('tokens taught: teacher 70.5%')"
    )
    assert examples.run("one", "--seed", "3") == {
        "measure": "perplexity",
        "mentors": [9.5],
        "alone": 12.25,
        "classroom": 11.0,
        "taught_percent": [70.5],
    }
    (tmp_path / "two.py").write_text("raise ValueError('no data')")
    with pytest.raises(RuntimeError, match="no data"):
        examples.run("two")


def test_no_example_ends_with_a_classroom_behind_the_student_alone():
    rows = json.loads(
        (Path(__file__).parents[2] / "benchmarks/results/cpu/examples.json").read_text()
    )["rows"]
    for name in ("plain", "lightning_module", "hugging_face"):
        own = [row for row in rows if row["example"] == name]
        assert [row["seed"] for row in own] == [0, 1, 2, 3, 4]
        assert sum(row["classroom"] - row["alone"] for row in own) >= 0, name
    text = "\n".join(teaching.RECORDS["examples"][2](rows))
    assert all(f"[{name}.py](../examples/{name}.py)" in text for name in examples.EXAMPLES)
