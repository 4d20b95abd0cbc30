"""The recipes for CIFAR-100, and the small one: what was published, and each can be trained."""

import numpy as np
import pytest
import torch

from classroomkd import cli, models, recipes
from classroomkd.data import Augmentation, ImageSet, ResidentLoader
from classroomkd.errors import UserError
from classroomkd.loss import methods
from classroomkd.reproduce.tables import TABLES
from classroomkd.runs.mentor_setup import find_mentors
from classroomkd.runs.recipe import Recipe, load_recipe
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.schedule import learning_rate, peak_learning_rate
from classroomkd.training.trainer import Trainer
from zoo_weights import without_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CIFAR = [name for name in recipes.names() if name.startswith("cifar100/")]
CLASSROOMS = [name for name in CIFAR if name != "cifar100/large-batch"]


@pytest.mark.parametrize("name", CLASSROOMS)
def test_a_classroom_is_the_published_one(name):
    """A student and six mentors, the first of them the teacher; how all are trained."""
    recipe = load_recipe(recipes.find(name))
    teacher, student, *_ = name.removeprefix("cifar100/").split("-")
    assert recipe.student == student
    sources = [mentor.source for mentor in recipe.mentors]
    assert (sources[0], len(sources)) == (teacher, 6)
    assert len({*sources}) == (1 if name.endswith("six-equal") else 6)
    assert {*sources, student} <= {*models.names()}
    data, training, mentors = recipe.data, recipe.training, recipe.mentor_training
    assert (data.image_size, data.padding, data.flip, data.cutout) == (32, 4, True, 0)
    assert data.mean == [0.5071, 0.4867, 0.4408]
    assert data.std == [0.2675, 0.2565, 0.2761]
    for one in (training, mentors):
        assert (one.epochs, one.batch_size, one.momentum, one.nesterov) == (240, 64, 0.9, False)
        assert (one.weight_decay, one.decay_norms_and_biases) == (5e-4, True)
    peak = peak_learning_rate(training, without_weights(student))
    rates = [learning_rate(training, peak, epoch) for epoch in (0, 60, 120, 149, 150, 180, 210)]
    assert rates == pytest.approx([0.05, 0.03, 0.01, 0.01, 1e-3, 1e-4, 1e-5])
    for source, peak in (("resnet56", 0.05), ("mobilenetv2", 0.01), ("shufflenetv1", 0.01)):
        assert peak_learning_rate(mentors, without_weights(source)) == peak
        rates = [learning_rate(mentors, peak, epoch) for epoch in (0, 149, 150, 180, 210)]
        assert rates == pytest.approx([peak, peak, peak / 10, peak / 100, peak / 1000])
    assert recipe.method == "classroom"
    # The paper's; the defaults are others for the two weights.
    assert recipe.loss == type(recipe.loss)(mentor_weight=None, task_weight="confidence")


def test_the_large_batch_takes_an_eighth_of_the_steps():
    small, large = (
        load_recipe(recipes.find(f"cifar100/{name}"))
        for name in ("resnet56-resnet20", "large-batch")
    )
    assert large.training.batch_size == 8 * small.training.batch_size
    assert large.training.learning_rate == pytest.approx(8 * small.training.learning_rate)
    assert large.training.nesterov
    assert not large.training.decay_norms_and_biases
    rates = [learning_rate(large.training, 0.4, epoch) for epoch in (1, 4, 120)]
    warm = [0.4 * (1 + np.cos(np.pi * epoch / 240)) / 2 * epoch / 5 for epoch in (1, 4)]
    assert rates == pytest.approx([*warm, 0.2])
    assert large.mentor_training == small.mentor_training  # the same mentors, from the store
    assert (large.mentors, large.data, large.loss) == (small.mentors, small.data, small.loss)


def test_the_recipe_chosen_on_validation_images_is_the_variant_of_the_table():
    (variant,) = (v for v in TABLES["ca_mkd"].variants("", Recipe()) if v.name == "ca_mkd+ranks")
    start = load_recipe(recipes.find("small-100"), variant.overrides)
    assert load_recipe(recipes.find("small-100-combination")) == start


# The training differs in these; each network takes its steps in tests/models/test_models.py.
@pytest.mark.parametrize(
    "name", ["cifar100/resnet56-resnet20", "cifar100/large-batch", "small-large-batch"]
)
def test_two_steps_of_a_recipe(name):
    recipe = load_recipe(recipes.find(name))
    found = find_mentors(recipe.mentors, recipe.mentor_training.epochs, print)
    torch.manual_seed(0)
    mentors = {m.name: models.create(m.architecture).eval() for m in found}
    bank = MentorBank(mentors, 100, device="cpu")
    assert len(bank) == len(recipe.mentors)
    torch.manual_seed(1)
    student = models.create(recipe.student)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    data, size = recipe.data, recipe.data.image_size
    images = np.random.default_rng(0).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    image_set = ImageSet(images, np.arange(8) * 12, [str(number) for number in range(100)])
    with ResidentLoader(
        image_set,
        4,
        mean=data.mean or (0.5,) * 3,
        std=data.std or (0.25,) * 3,
        augmentation=Augmentation(data.padding, data.flip, data.cutout),
        shuffle=True,
        drop_last=True,
    ) as loader:
        trainer = Trainer(
            student,
            loader,
            recipe.training,
            name=recipe.student,
            peak=peak_learning_rate(recipe.training, student),
            method=methods.create(recipe.method, **vars(recipe.loss)),
            mentors=bank,
        )
        record = trainer.train_epoch()
    momenta = trainer.optimizer.state_dict()["state"]
    assert len(momenta) == len(list(student.parameters()))
    assert np.isfinite(record["train_loss"])
    assert record["train_loss"] > 0
    assert list(record["mentors"]) == [m.name for m in found]
    after = student.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    counts = [after[key] for key in after if key.endswith("num_batches_tracked")]
    assert all(count == 2 for count in counts)
    assert all((after[k] != before[k]).any() for k in after if k.endswith("weight"))


def test_a_file_wins_over_a_packaged_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = recipes.find("cifar100/vgg13-vgg8")
    assert packaged.read_text().startswith("# vgg8 taught by vgg13")
    (tmp_path / "cifar100").mkdir()
    own = tmp_path / "cifar100" / "vgg13-vgg8"
    own.write_text("student: resnet8")
    assert recipes.find("cifar100/vgg13-vgg8").samefile(own)


def test_a_recipe_that_is_not_there(capsys):
    with pytest.raises(UserError, match=r"resnet20-resnet56 is neither .*cifar100/resnet110-res"):
        recipes.find("resnet20-resnet56")
    assert cli.main(["train", "--data", "x", "--recipe", "cifar100/resnet56-resnet2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cifar100/resnet56-resnet20" in line


def test_the_list(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.strip()]
    assert set(recipes.names()) <= set(listed)
    (line,) = [line for line in lines if line.startswith("cifar100/resnet110-resnet32 ")]
    assert "resnet32" in line.split()


def test_a_base_gives_what_a_recipe_leaves_out(tmp_path):
    (tmp_path / "mine").mkdir()
    first, second = tmp_path / "first.yaml", tmp_path / "mine" / "second.yaml"
    first.write_text("base: cifar100/vgg13-vgg8\ntraining: {epochs: 5, warmup_epochs: 1}")
    second.write_text("base: ../first.yaml\nstudent: resnet8\ntraining: {epochs: 7}")
    packaged = load_recipe(recipes.find("cifar100/vgg13-vgg8"))
    found = load_recipe(second)
    assert (found.student, found.mentors) == ("resnet8", packaged.mentors)
    assert (found.training.epochs, found.training.warmup_epochs) == (7, 1)
    assert found.training.batch_size == packaged.training.batch_size
    assert found.mentor_training == packaged.mentor_training  # the base sets its epochs
    first.write_text("base: cifar100/vgg13-vgg8\ntraining: {warmup_epochs: 2}")
    assert load_recipe(second).training.warmup_epochs == 2  # read anew


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("absent.yaml", "second.yaml: base: absent.yaml is neither a file nor a packaged recipe"),
        ("first.yaml", "first.yaml: base: second.yaml is based on this file itself"),
        ("second.yaml", "second.yaml: base: second.yaml is based on this file itself"),
    ],
)
def test_bases_that_cannot_be(tmp_path, base, reason):
    (tmp_path / "first.yaml").write_text("base: second.yaml")
    (tmp_path / "second.yaml").write_text(f"base: {base}")
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "second.yaml")
    assert reason in str(error.value)
