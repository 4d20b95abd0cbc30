"""The ImageNet recipes: all can be built and take steps, and one trains through the command line.

The mentors have random weights: the pretrained ones would have to be downloaded.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from classroomkd import cli, recipes
from classroomkd.data import ImageSet, ResidentLoader
from classroomkd.loss.methods import create as create_method
from classroomkd.models import create, load_network
from classroomkd.runs.recipe import load_recipe
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.schedule import learning_rate, peak_learning_rate
from classroomkd.training.trainer import Trainer
from zoo_weights import without_weights

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm"),
    pytest.mark.usefixtures("one_thread"),
]

NAMES = [name for name in recipes.names() if name.startswith("imagenet/")]


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe(name):
    recipe = load_recipe(recipes.find(name))
    teacher, student = name.removeprefix("imagenet/").split("-")
    assert recipe.mentors[0].source == f"tv:{teacher}"
    assert recipe.student.split(":")[1].replace("_", "").startswith(student.replace("_", ""))
    assert len({mentor.source for mentor in recipe.mentors}) == 5
    assert all(mentor.epochs is None for mentor in recipe.mentors)  # pretrained
    data, training = recipe.data, recipe.training
    assert (data.image_size, data.crop, data.flip, data.validation) == (224, "resize", True, 0)
    assert (data.mean, data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert training == recipe.mentor_training
    assert (training.epochs, training.batch_size, training.nesterov) == (100, 512, True)
    assert (training.weight_decay, training.decay_norms_and_biases) == (1e-4, False)
    assert training.momentum == 0.9
    assert recipe.loss == type(recipe.loss)(mentor_weight=None, task_weight="confidence")
    peak = peak_learning_rate(training, without_weights(recipe.student))
    rates = [learning_rate(training, peak, done) for done in (0, 29, 30, 59, 60, 89, 90, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


# The third differs in its mentors alone, one of which has 145 million parameters.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet/resnet34-resnet18", "imagenet/resnet50-mobilenet_v1"])
def test_two_steps_of_its_training(name):
    recipe = load_recipe(recipes.find(name))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    image_set = ImageSet(images, np.arange(4), [*"abcd"])
    torch.manual_seed(0)
    student = create(recipe.student, 4)
    mentors = {mentor.source: create(mentor.source, 4) for mentor in recipe.mentors}
    bank = MentorBank(mentors, 4, device="cpu")
    del mentors  # the bank has copies
    before = {key: value.clone() for key, value in student.state_dict().items()}
    options = {"mean": recipe.data.mean, "std": recipe.data.std, "augmentation": None}
    with ResidentLoader(image_set, 2, shuffle=True, drop_last=True, **options) as loader:
        trainer = Trainer(
            student,
            loader,
            recipe.training,
            name="the student",
            peak=recipe.training.learning_rate,
            method=create_method(recipe.method),
            mentors=bank,
            image_size=64,
        )
        record = trainer.train_epoch()
    assert (trainer.epoch, len(loader)) == (2, 2)
    assert np.isfinite(record["train_loss"])
    assert [*record["mentors"]] == bank.names
    for key, value in student.state_dict().items():
        assert value.isfinite().all(), key
        if value.is_floating_point():
            assert not torch.equal(value, before[key]), key


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """train/ with four and val/ with two photographs of each of two classes, in two shapes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for channel, name in enumerate(("n01440764", "n01443537")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 150, (7, 7, 3), dtype=np.uint8)
                coarse[..., channel] += 100
                image = Image.fromarray(coarse).resize(((224, 300)[i % 2], 224))
                image.save(root / part / name / f"{i}.JPEG")
    return root


@pytest.mark.slow
def test_one_trains_through_the_command_line(photos, tmp_path, capsys):
    out, name = tmp_path / "run", "imagenet/resnet34-resnet18"
    sources = ["tv:mobilenet_v2", "timm:tf_mobilenetv3_large_minimal_100"]
    mentors = ",".join(f"{{source: '{source}', epochs: 1}}" for source in sources)
    # Two steps at its learning rate would leave weights that only make numbers overflow.
    rates = ["training.learning_rate=1e-3", "mentor_training.learning_rate=1e-3"]
    overrides = [f"mentors=[{mentors}]", "mentor_training.batch_size=4", "store=false", *rates]
    options = ["--recipe", name, "--data", str(photos), "--batch-size", "4", "--epochs", "1"]
    options += ["--image-size", "64"]
    assert cli.main(["train", *overrides, *options, "--out", str(out)]) == 0, capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"]["train_images"] == 8
    trained = [result["name"] for result in summary["results"]]
    assert trained == [*sources, "tv:resnet18", "tv:resnet18"]
    assert all(np.isfinite(result["loss"]) for result in summary["results"])
    network, info, architecture = load_network(out)
    assert (architecture, info.classes) == ("tv:resnet18", ["n01440764", "n01443537"])
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["training"]["nesterov"], saved["data"]["crop"]) == (True, "resize")
    assert cli.main(["evaluate", str(out), "--data", str(photos)]) == 0
    assert "images  4\n" in capsys.readouterr().out
