"""A network that learns nothing is told, in a line with what to try; one that learns is not."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from classroomkd import models
from classroomkd.data import ImageSet, digits
from classroomkd.report.page import write_report
from classroomkd.runs.at_chance import is_at_chance, most_frequent, remedies
from classroomkd.runs.recipe import load_recipe
from classroomkd.runs.training_run import TrainingRun
from small_runs import colours, recipe, records


def at_chance(*top1: float, chance: float = 0.1, steps: int = 250, images: int = 16_000) -> bool:
    epochs = [{"train_top1": value} for value in top1]
    return is_at_chance(epochs, chance=chance, steps=steps, images=images)


def test_three_standard_errors_by_hand():
    limit = 0.1 + 3 * math.sqrt(0.1 * 0.9 / 16_000)
    assert at_chance(limit - 1e-6)
    assert not at_chance(limit + 1e-6)
    assert at_chance(0.9, 0.9, 0.1)  # back at it
    assert not at_chance(0.1, 0.1, 0.9)


def test_short_epochs_are_judged_together_and_late():
    """Of 3 steps and 192 images: from the 67th on, by the last 17."""
    short = {"chance": 0.2, "steps": 3, "images": 192}
    assert not at_chance(*[0.2] * 66, **short)
    assert at_chance(*[0.2] * 67, **short)
    limit = 0.2 + 3 * math.sqrt(0.2 * 0.8 / (17 * 192))
    for above, outcome in ((1e-6, False), (-1e-6, True)):
        assert at_chance(*[0.9] * 50, *[limit + above] * 17, **short) == outcome
        # Noise of single epochs does not decide.
        noisy = [limit + above + 0.05, limit + above - 0.05] * 8 + [limit + above]
        assert at_chance(*[0.9] * 50, *noisy, **short) == outcome


def test_chance_is_naming_the_most_frequent_class():
    assert most_frequent(np.array([2, 0, 2, 1, 2])) == 0.6
    assert at_chance(0.6, chance=0.6)
    # Where nearly all are of one class, healthy trainings begin by naming it.
    assert not at_chance(0.9, chance=0.9)


@pytest.mark.parametrize(
    ("phase", "overrides", "tries"),
    [
        (
            "student",
            ["loss.mentor_weight=null", "loss.task_weight=confidence"],
            "loss.task_weight=1 or a lower training.learning_rate or training.clip_norm=1 or "
            "loss.mentor_weight=0.3",
        ),
        (
            "student",
            ["loss.mentor_weight=0.3", "loss.task_weight=0.5", "training.clip_norm=2"],
            "a lower training.learning_rate or loss.mentor_weight=0.1",
        ),
        ("student", ["method=kd"], "a lower training.learning_rate or training.clip_norm=1"),
        ("alone", [], "a lower training.learning_rate or training.clip_norm=1"),
        ("mentor", [], "a lower mentor_training.learning_rate or mentor_training.clip_norm=1"),
    ],
)
def test_what_to_try_can_be_tried(phase, overrides, tries):
    begun = load_recipe(None, overrides)
    assert remedies(begun, phase, n_classes=10, n_mentors=3) == f"try {tries}"
    for item in tries.split(" or "):
        if "=" in item:
            assert load_recipe(None, [*overrides, item]) != begun


def run(recipe, image_set: ImageSet, out: Path) -> str:
    """What a run prints."""
    text = io.StringIO()
    TrainingRun(recipe, Console(file=text, width=200)).run(image_set, image_set, out)
    return text.getvalue()


def test_a_dead_student_is_told_once_and_on_the_page(tmp_path, monkeypatch):
    create = models.create

    def dead(*arguments):
        network = create(*arguments)
        network.register_forward_hook(lambda network, images, logits: logits * 0)
        return network

    monkeypatch.setattr(models, "create", dead)
    short = recipe("mentors=[]", "method=alone", "training.epochs=11", "training.batch_size=4")
    out = tmp_path / "run"
    text = run(short, colours(80), out)
    (line,) = (line for line in text.splitlines() if "at chance" in line)
    assert line.startswith(
        "resnet8 alone, epoch 10: training top-1 is 33.8%, at chance: always predicting "
    )
    assert line.endswith("gives 33.8%; try a lower training.learning_rate or training.clip_norm=1")
    shares = [record.get("chance_top1") for record in records(out)]
    assert shares == [None] * 9 + [27 / 80] * 2
    page = write_report([out]).read_text()
    told = "resnet8 alone: training top-1 at chance in 2 of 11 epochs, first in epoch 10."
    assert f'<p class="warning">{told}</p>' in page


@pytest.mark.parametrize("phase", ["alone", "student"])
def test_a_healthy_network_of_a_small_set_is_not_told(tmp_path, phase):
    """Of 5 digits with 40 pictures each, when its 200 steps are over."""
    train, _ = digits()
    chosen = np.concatenate([np.flatnonzero(train.targets == c)[:40] for c in range(5)])
    few = ImageSet(train.images[chosen], train.targets[chosen], train.classes[:5])
    method = {"alone": "alone", "student": "classroom"}[phase]
    small = recipe("data.image_size=16", "mentors=[resnet8]", f"method={method}")
    small = replace(small, alone=False, training=replace(small.training, epochs=8))
    small.mentor_training.epochs = 4
    assert "at chance" not in run(small, few, tmp_path / "run")
    *_, last = records(tmp_path / "run")
    assert (last["phase"], last["epoch"], "chance_top1" in last) == (phase, 8, False)
    assert last["train_top1"] > 0.5
