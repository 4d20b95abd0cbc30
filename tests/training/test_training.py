"""The trainer, the schedules, the run folder and a whole small classroom."""

from __future__ import annotations

import copy
import errno
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from classroomkd import classroom_loss
from classroomkd.data import Augmentation, ImageSet, Loaders, ResidentLoader, channel_statistics
from classroomkd.errors import UserError
from classroomkd.loss.methods import Method
from classroomkd.loss.methods import create as create_method
from classroomkd.models import NetworkInfo, create, load_network, save_network
from classroomkd.models.layout import Renormalised
from classroomkd.runs import networks as networks_module
from classroomkd.runs.checkpoints import Checkpoints
from classroomkd.runs.mentor_setup import fit_to_data
from classroomkd.runs.paths import choose_folder, recorded_data
from classroomkd.runs.recipe import load_recipe
from classroomkd.runs.run_folder import RunFolder
from classroomkd.runs.training_run import TrainingRun
from classroomkd.training.config import TrainingConfig
from classroomkd.training.evaluation import evaluate, evaluation_loader
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.schedule import learning_rate
from classroomkd.training.trainer import Trainer
from small_runs import CLASSES, colours, recipe, same, values_of

pytestmark = pytest.mark.usefixtures("one_thread")


def info_of(image_set: ImageSet, architecture: str = "resnet8") -> NetworkInfo:
    size = image_set.images.shape[1]
    return NetworkInfo(architecture, image_set.classes, *channel_statistics(image_set), size)


def measuring(image_set: ImageSet, info: NetworkInfo):
    return evaluation_loader(Loaders("resident", [image_set], "cpu"), image_set, info)


def batches(image_set: ImageSet, batch_size: int = 8, seed: int = 0) -> ResidentLoader:
    mean, std = channel_statistics(image_set)
    return ResidentLoader(
        image_set,
        batch_size,
        mean=mean,
        std=std,
        augmentation=Augmentation(1, True),
        shuffle=True,
        drop_last=True,
        seed=seed,
    )


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
    )


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("epoch", "student", "mentor"),
    [  # of 240, counted from 1
        (1, 0.05, 0.05),
        (61, 0.03, 0.05),
        (120, 0.01 + 0.04 / 120, 0.05),
        (121, 0.01, 0.05),
        (150, 0.01, 0.05),
        (151, 1e-3, 5e-3),
        (180, 1e-3, 5e-3),
        (181, 1e-4, 5e-4),
        (211, 1e-5, 5e-5),
        (240, 1e-5, 5e-5),
    ],
)
def test_schedules_are_the_published_ones_at_240_epochs(epoch, student, mentor):
    for name, rate in (("classroom", student), ("steps", mentor)):
        training = TrainingConfig(schedule=name)
        for within in (0, 0.25, 0.999):  # they change from epoch to epoch
            assert learning_rate(training, 0.05, epoch - 1 + within) == pytest.approx(rate)
        assert learning_rate(training, 0.5, epoch - 1) == pytest.approx(10 * rate, rel=1e-12)


def test_schedule_scales_with_the_epochs():
    rates = [learning_rate(TrainingConfig(epochs=8), 0.05, done) for done in range(8)]
    assert rates == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01, 1e-3, 1e-4, 1e-5], rel=1e-12)


def test_cosine_and_warm_up():
    cosine = TrainingConfig(epochs=10, schedule="cosine", warmup_epochs=2)
    shape = [(1 + math.cos(math.pi * done / 10)) / 2 for done in (0.5, 1, 2, 5, 9.99)]
    expected = [shape[0] * 0.25, shape[1] * 0.5, *shape[2:]]
    got = [learning_rate(cosine, 1.0, done) for done in (0.5, 1, 2, 5, 9.99)]
    assert got == pytest.approx(expected, rel=1e-12)
    imagenet = TrainingConfig(epochs=100, schedule="steps", milestones=[0.3, 0.6, 0.9])
    rates = [learning_rate(imagenet, 0.1, done) for done in (29, 30, 59, 60, 89, 90)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4])


# ---------------------------------------------------------------- the trainer


def test_trainer_learns_a_separable_problem():
    trainer = trainer_of(network(0), colours(96), epochs=6)
    records = [trainer.train_epoch() for _ in range(6)]
    assert records[0]["train_loss"] > 0.2 > 0.1 > records[-1]["train_loss"]
    assert records[-1]["train_top1"] > 0.95
    held_out = colours(60, seed=1)
    with measuring(held_out, info_of(colours(96))) as loader:
        assert evaluate(trainer.network, loader).top1 > 0.9


@pytest.mark.parametrize("clip_norm", [None, 4.0])
@pytest.mark.parametrize("mentor_seeds", [(), (1, 2)])
def test_epoch_is_plain_sgd_on_the_loss(mentor_seeds, clip_norm):
    image_set = colours(44)  # 5 batches of 8 and an incomplete one, which is dropped
    mentors = {f"m{seed}": network(seed) for seed in mentor_seeds}
    trained, expected = network(0), network(0)
    trainer = trainer_of(
        *(trained, image_set),
        epochs=2,
        rate=0.1,
        mentors=mentors,
        method=create_method("classroom", temperature=4.0) if mentors else None,
        clip_norm=clip_norm,
    )
    records = [trainer.train_epoch() for _ in range(2)]

    reference = {name: copy.deepcopy(mentor).eval() for name, mentor in mentors.items()}
    velocity, norms = [torch.zeros_like(parameter) for parameter in expected.parameters()], []
    for epoch, rate in ((1, 0.1), (2, 0.01)):
        losses, hits, reports = [], 0, []
        loader = batches(image_set)
        loader.set_epoch(epoch)
        for images, targets, _ in loader:
            logits = expected(images)
            if reference:
                taught = torch.stack([mentor(images).detach() for mentor in reference.values()])
                loss, report = classroom_loss(
                    logits, taught, targets, temperature=4.0, return_report=True
                )
                reports.append(report)
            else:
                loss = F.cross_entropy(logits, targets)
            losses.append(loss.item())
            hits += int((logits.argmax(1) == targets).sum())
            gradients = torch.autograd.grad(loss, list(expected.parameters()))
            norms.append(math.hypot(*(gradient.norm().item() for gradient in gradients)))
            if clip_norm:
                gradients = [g * min(1.0, clip_norm / norms[-1]) for g in gradients]
            with torch.no_grad():
                for parameter, v, g in zip(expected.parameters(), velocity, gradients, strict=True):
                    v.mul_(0.9).add_(g + 5e-4 * parameter)
                    parameter.sub_(rate * v)
        record = records[epoch - 1]
        assert len(losses) == 5
        assert record["learning_rate"] == pytest.approx(rate)
        assert record["train_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert record["train_top1"] == pytest.approx(hits / 40, abs=1e-9)
        for index, name in enumerate(reference):
            means = record["mentors"][name]
            for field in ("active_share", "rank_weight", "temperature"):
                values = [getattr(report, field)[index].item() for report in reports]
                assert means[field] == pytest.approx(np.mean(values), rel=1e-4)
    assert min(norms) < 4.0 < max(norms)  # some steps are clipped and some are not
    for ours, theirs in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clipped_step_is_as_long_as_it_may_be_and_goes_where_it_went(dtype):
    """Of plain gradient descent at rate 1: the norm over the network's and the method's parameters.

    Gradients are float32 under autocast too.
    """

    class Scaled(Method):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(0.5))

        def forward(self, student, mentors, targets):
            return F.cross_entropy(student.logits.float() / self.temperature, targets)

    steps = {}
    for clip_norm in (None, 0.1, 1e6):
        plain = TrainingConfig(batch_size=8, momentum=0.0, weight_decay=0.0, clip_norm=clip_norm)
        student, method = network(0), Scaled()
        trainer = Trainer(
            *(student, batches(colours(8)), plain), name="toy", peak=1.0, method=method, dtype=dtype
        )
        parameters = [*student.parameters(), method.temperature]
        before = nn.utils.parameters_to_vector(parameters).detach().double()
        trainer.train_epoch()
        steps[clip_norm] = nn.utils.parameters_to_vector(parameters).detach().double() - before
    assert steps[None].norm() > 0.5
    assert steps[None][-1].abs() > 0.01  # the method's own
    torch.testing.assert_close(
        steps[0.1], 0.1 * F.normalize(steps[None], dim=0), rtol=1e-3, atol=1e-6
    )
    assert torch.equal(steps[1e6], steps[None])


def trainer_of(
    student,
    image_set,
    *,
    name="toy",
    epochs=1,
    rate=0.05,
    mentors=None,
    method=None,
    clip_norm=None,
    **options,
):
    """A tenth of the rate from the training's half on."""
    bank = MentorBank(mentors, 3, device="cpu") if mentors else None
    schedule = {"schedule": "steps", "milestones": [0.5]}
    training = TrainingConfig(epochs=epochs, batch_size=8, clip_norm=clip_norm, **schedule)
    loader = batches(image_set)
    method = method or create_method("classroom" if bank else "alone")
    return Trainer(
        student, loader, training, name=name, peak=rate, method=method, mentors=bank, **options
    )


class Scripted(Method):
    """Ignores the mentors and reports, batch after batch, what it was told."""

    reports = True

    def __init__(self, active_shares, kls):
        super().__init__()
        self._script = iter(zip(active_shares, kls, strict=True))

    def backward(self, student, mentors, targets, scale=None):
        active, kl = next(self._script)
        report = SimpleNamespace(
            active_share=torch.tensor([active, 0.0]),
            rank_weight=torch.tensor([1.5, 0.5]),
            temperature=torch.tensor([3.0, 1.0]),
            kl=torch.tensor([kl, 0.0]),
            student_confidence=torch.tensor(0.25),
            task_loss=torch.tensor(2.0),
        )
        loss = F.cross_entropy(student.logits, targets)
        loss.backward()
        return loss.detach(), report


def test_record_averages_kl_over_the_rows_that_were_taught():
    trainer = trainer_of(
        *(network(0), colours(16)),
        name="toy",
        epochs=1,
        mentors={"busy": network(1), "idle": network(2)},
        method=Scripted([1.0, 0.25], [0.2, 1.0]),
    )
    record = trainer.train_epoch()
    assert record["mentors"]["busy"] == pytest.approx(
        {"active_share": 0.625, "rank_weight": 1.5, "temperature": 3.0, "kl": 0.36}
    )  # (8 · 0.2 + 2 · 1.0) / 10
    assert record["mentors"]["idle"]["kl"] == 0.0
    assert (record["task_loss"], record["student_confidence"]) == (2.0, 0.25)


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_no_step_reads_a_value_back(clip_norm):
    trainer = trainer_of(
        *(network(0), colours(16)),
        name="toy",
        epochs=1,
        mentors={"a": network(1), "b": network(2)},
        method=Scripted([1.0, 0.25], [0.2, 1.0]),
        clip_norm=clip_norm,
    )
    trainer.network.train()
    with _NoHostReads():
        for images, targets, _ in trainer.loader:
            trainer._step(images, targets)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.zeros(1).item()


def trainer_on_gpu(cuda_graph: bool = True) -> Trainer:
    image_set, device = colours(80), torch.device("cuda")  # 10 steps
    mean, std = channel_statistics(image_set)
    options = {"augmentation": Augmentation(1, True), "shuffle": True, "drop_last": True}
    return Trainer(
        network(0).to(device),
        ResidentLoader(image_set, 8, mean=mean, std=std, device=device, **options),
        TrainingConfig(epochs=2, clip_norm=1.0),
        name="toy",
        peak=0.05,
        mentors=MentorBank({"a": network(1), "b": network(2)}, 3, device=device),
        method=create_method("classroom"),
        cuda_graph=cuda_graph,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_waits_for_the_gpu():
    trainer = trainer_on_gpu()
    trainer.train_epoch()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, targets, _ in trainer.loader:
            trainer._step_on(images, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replayed_step_is_the_launched_one():
    """Ten steps of a classroom: weights, running statistics and the sums on the device."""
    left = {}
    for cuda_graph in (True, False):
        trainer = trainer_on_gpu(cuda_graph)
        left[cuda_graph] = trainer.train_epoch(), trainer.network.state_dict()
    (replayed, weights), (launched, expected) = left[True], left[False]
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert replayed["train_loss"] == pytest.approx(launched["train_loss"], rel=1e-4)
    assert replayed["mentors"]["a"] == pytest.approx(launched["mentors"]["a"], rel=1e-3)


def test_the_batch_is_named_from_the_sums_of_all_processes():
    """Of two with 8 images each: after one good batch of four, 16 images of 64 were well."""
    trainer = trainer_of(network(0), colours(32))
    trainer.processes.world_size = 2
    with pytest.raises(UserError, match="batch 2 of 4: the loss is not finite: the training div"):
        trainer._require_finite([64.0, 48.0])


def test_mentors_stay_what_they_are_bit_for_bit():
    mentors = {"a": network(1).train(), "b": network(2)}
    before = {name: values_of(mentor) for name, mentor in mentors.items()}
    student = network(0)
    start = values_of(student)
    trainer = trainer_of(student, colours(32), mentors=mentors)
    trainer.train_epoch()
    assert not same(start, values_of(student))
    for name, mentor in mentors.items():
        assert same(before[name], values_of(mentor))


class _Mentor(nn.Module):
    """Rules a class out for one image; after some healthy calls gives it no number at all."""

    def __init__(self, healthy_calls: int) -> None:
        super().__init__()
        self.inner, self.left = network(5), healthy_calls

    def forward(self, images):
        logits = self.inner(images).clone()
        self.left -= 1
        logits[0, 2] = -math.inf if self.left >= 0 else math.nan
        return logits


def test_a_sick_mentor_stops_the_training_by_name(monkeypatch):
    trainer = trainer_of(
        *(network(0), colours(48)),
        name="resnet8 in the classroom",
        epochs=3,
        rate=1e-3,
        mentors={"well": _Mentor(healthy_calls=99), "sick": _Mentor(healthy_calls=8)},
    )
    trainer.train_epoch()
    with pytest.raises(UserError) as caught:
        trainer.train_epoch()
    message = str(caught.value)
    assert message.startswith("resnet8 in the classroom, epoch 2, batch 3 of 6: the loss is not")
    assert "mentor sick" in message


def test_divergence_is_not_blamed_on_a_mentor():
    trainer = trainer_of(
        *(network(0), colours(32)),
        name="resnet8",
        epochs=1,
        rate=1e20,
        mentors={"well": network(1)},
    )
    with pytest.raises(UserError, match=r"resnet8, epoch 1, batch [23] of 4: .* lower learning"):
        trainer.train_epoch()


def test_divergence_is_seen_within_an_epoch(monkeypatch):
    """At the second look after it, not at the end of an epoch that may take an hour."""
    monkeypatch.setattr("classroomkd.training.trainer.READ_EVERY", 3)
    trainer = trainer_of(network(0), colours(160), rate=1e20)
    with pytest.raises(UserError, match=r"batch [23] of 20"):
        trainer.train_epoch()
    assert trainer.batch == 6


# ---------------------------------------------------------------- evaluation


def test_evaluation_agrees_with_counting_by_hand():
    rng = np.random.default_rng(0)
    count, classes = 300, 7  # two batches
    image_set = ImageSet(
        rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
        rng.integers(0, classes, count),
        [str(name) for name in range(classes)],
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes), nn.Dropout(0.5)).train()
    info = info_of(image_set)
    with measuring(image_set, info) as loader:
        measured = evaluate(model, loader)

    weight, bias = (parameter.detach().double().numpy() for parameter in model[1].parameters())
    top1 = top5 = loss = 0.0
    bins, by_class = np.zeros((15, 3)), np.zeros((classes, 2))
    for image, target in zip(image_set.images, image_set.targets, strict=True):
        pixels = (image / 255 - info.mean) / info.std
        logits = weight @ pixels.transpose(2, 0, 1).reshape(-1) + bias
        rank = int((logits > logits[target]).sum())
        top1, top5 = top1 + (rank == 0), top5 + (rank < 5)
        loss += np.log(np.exp(logits).sum()) - logits[target]
        confidence = np.exp(logits).max() / np.exp(logits).sum()
        bins[int(confidence * 15)] += 1, confidence, rank == 0
        by_class[target] += 1, rank == 0
    assert (measured.top1, measured.top5) == pytest.approx((top1 / count, top5 / count), abs=1e-12)
    assert measured.loss == pytest.approx(loss / count, rel=1e-5)
    assert measured.images == count
    filled = bins[bins[:, 0] > 0]
    error = sum(n / count * abs(p / n - hits / n) for n, p, hits in filled)
    assert measured.calibration_error == pytest.approx(error, abs=1e-6)
    assert measured.per_class == pytest.approx(list(by_class[:, 1] / by_class[:, 0]))


def test_evaluation_of_certain_and_absent_classes():
    """A probability of exactly 1 falls into the last bin; a class without images has no top-1."""

    class Certain(nn.Module):
        def forward(self, images):
            return torch.tensor([[100.0, 0.0, 0.0]]).repeat(len(images), 1)

    image_set = ImageSet(np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 0, 0, 1]), CLASSES)
    with measuring(image_set, info_of(colours(9))) as loader:
        measured = evaluate(Certain(), loader)
    assert measured.per_class == [1.0, 0.0, None]
    assert measured.calibration_error == pytest.approx(0.25)


def test_top5_of_three_classes_is_all():
    with measuring(colours(9), info_of(colours(9))) as loader:
        assert evaluate(network(0), loader).top5 == 1.0


# ---------------------------------------------------------------- given mentors


def test_renormalised_network_gives_the_logits_of_its_own_statistics():
    image_set = colours(12)
    data = info_of(image_set)
    own = replace(data, mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3))
    model = network(3).eval()
    fitted = fit_to_data(model, own, data, "mentor")
    assert isinstance(fitted, Renormalised)
    with measuring(image_set, data) as here, measuring(image_set, own) as there:
        (images, *_), (own_images, *_) = next(iter(here)), next(iter(there))
    with torch.no_grad():
        torch.testing.assert_close(fitted(images), model(own_images), rtol=1e-4, atol=1e-5)
        assert (model(images) - model(own_images)).abs().max() > 0.1  # it did matter
    assert fit_to_data(model, data, data, "mentor") is model
    assert fit_to_data(model, None, data, "mentor") is model


def test_network_of_other_classes_is_refused():
    data = info_of(colours(12))
    with pytest.raises(UserError, match=r"mentor x has 3 classes, the data has 2"):
        fit_to_data(network(0), None, replace(data, classes=["a", "b"]), "mentor x")
    other = replace(data, classes=["red", "blue", "green"])
    with pytest.raises(UserError, match=r"class 1 is 'blue' there and 'green' in the data"):
        fit_to_data(network(0), other, data, "mentor x")


# ---------------------------------------------------------------- the run folder


def test_run_writes_null_for_what_is_not_finite(tmp_path: Path):
    run = RunFolder(tmp_path / "run", {"seed": 3})
    run.record({"epoch": 1, "train_loss": math.nan, "mentors": {"a": {"kl": math.inf}}})
    run.record({"epoch": 2})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"epoch": 1, "train_loss": None, "mentors": {"a": {"kl": None}}},
        {"epoch": 2},
    ]
    with pytest.raises(UserError, match="cannot write to"):
        RunFolder(tmp_path / "run", {})  # a second run beside it


def test_choice_of_the_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_folder(None, "quickstart") == Path("runs/quickstart")
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart-2").mkdir()
    assert choose_folder(None, "quickstart") == Path("runs/quickstart-3")
    assert choose_folder(Path("runs/quickstart"), "x") == Path("runs/quickstart")  # empty
    (tmp_path / "runs/quickstart/file").touch()
    for path in (Path("runs"), Path("runs/quickstart/file"), Path("runs/quickstart/file/below")):
        with pytest.raises(UserError, match=str(path)):
            choose_folder(path, "x")


# ---------------------------------------------------------------- a whole classroom


TRAINED = [  # in this order
    ("mentor", "resnet8", 2),
    ("mentor", "resnet14", 1),
    ("mentor", "resnet8-2", 1),
    ("alone", "resnet8", 2),
    ("student", "resnet8", 2),
]


def hold(out: Path, *overrides: str, resume: bool = False) -> dict:
    classroom = TrainingRun(recipe(*overrides), Console(file=io.StringIO()))
    return classroom.run(colours(28), colours(13, seed=1), out, resume=resume)


@pytest.mark.usefixtures("pages")
def test_classroom_leaves_the_records_and_networks(tmp_path: Path, states_kept):
    out = tmp_path / "run"
    summary = hold(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["name"], line["epoch"], line["epochs"]) for line in lines] == [
        (phase, name, epoch, epochs)
        for phase, name, epochs in TRAINED
        for epoch in range(1, epochs + 1)
    ]
    for line in lines:
        assert line["images_per_second"] > 0 < line["seconds"]
        assert ("mentors" in line) == (line["phase"] == "student")
    assert list(lines[-1]["mentors"]) == ["resnet8", "resnet14", "resnet8-2"]
    assert [line["learning_rate"] for line in lines[-4:]] == pytest.approx([0.05, 0.01] * 2)

    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["data"] == {
        "name": "colours",
        "classes": 3,
        "class_names": CLASSES,
        "train_images": 28,
        "test_images": 13,
    }
    assert [(r["phase"], r["name"], r["epochs"]) for r in summary["results"]] == TRAINED
    last = {(line["phase"], line["name"]): line for line in lines}
    data = info_of(colours(28))
    files = {
        **{("mentor", f.stem): f for f in (out / "mentors").iterdir()},
        ("alone", "resnet8"): out / "student_alone.safetensors",
        ("student", "resnet8"): out / "student.safetensors",
    }
    assert len(files) == 5
    for result in summary["results"]:
        key = result["phase"], result["name"]
        assert (result["top1"], result["loss"]) == (last[key]["test_top1"], last[key]["test_loss"])
        model, info, architecture = load_network(files[key])
        assert architecture == result["architecture"] == result["name"].removesuffix("-2")
        assert info == replace(data, architecture=architecture)
        assert result["parameters"] == sum(p.numel() for p in model.parameters())
        with measuring(colours(13, seed=1), info) as loader:
            measured = evaluate(model, loader)
        assert (measured.top1, measured.top5) == (result["top1"], result["top5"])
        assert measured.loss == pytest.approx(result["loss"], rel=1e-5)
        checkpoint = Checkpoints(out / "checkpoints" / f"{key[0]}-{key[1]}").newest()
        again, again_info, _ = load_network(checkpoint)
        assert same(again.state_dict(), model.state_dict())
        assert again_info == info
        state = torch.load(checkpoint, weights_only=True)
        assert (state["epoch"], state["batch"]) == (result["epochs"] + 1, 0)
        assert len(state["optimizer"]["state"]) == len(list(model.parameters()))
    assert load_recipe(out / "config.yaml") == recipe()
    assert (out / "report.html").stat().st_size > 0


def test_validation_images_are_trained_on_by_nobody(tmp_path: Path, monkeypatch):
    """They are split off by seed, class by class; choices are made on them alone."""
    trained_on = []

    class Spy(Trainer):
        def __init__(self, model, loader, training, **options):
            super().__init__(model, loader, training, **options)
            trained_on.append({bytes(image.tobytes()) for image in loader._images.numpy()})

    monkeypatch.setattr(networks_module, "Trainer", Spy)
    summary = hold(tmp_path / "run", "data.validation=0.25", "training.epochs=3")
    whole = {bytes(image.tobytes()) for image in colours(28).images}
    assert len(trained_on) == 5
    assert all(images == trained_on[0] for images in trained_on)
    assert len(trained_on[0]) == 28 - 6  # 2 images each of the classes' 10, 9 and 9
    assert trained_on[0] < whole
    assert (summary["data"]["train_images"], summary["data"]["validation_images"]) == (22, 6)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["phase"] == "student"]
    result = summary["results"][-1]
    assert result["best_test_top1"] == max(line["test_top1"] for line in last)
    validation = [line["validation_top1"] for line in last]
    assert result["chosen_epoch"] == 1 + validation.index(max(validation))
    assert result["chosen_top1"] == last[result["chosen_epoch"] - 1]["test_top1"]
    assert result["top1"] == last[-1]["test_top1"]
    without = hold(tmp_path / "without", "training.epochs=1")
    assert "validation_images" not in without["data"]
    assert "chosen_epoch" not in without["results"][-1]


def test_same_seed_same_bits(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7)  # what the process drew before does not matter
        hold(tmp_path / name, f"seed={seed}")
    for file in (
        "student.safetensors",
        "student_alone.safetensors",
        "mentors/resnet14.safetensors",
    ):
        first, again, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == again
        assert first != other


def test_student_starts_alike_alone_and_in_the_classroom(tmp_path: Path, monkeypatch):
    starts, seen = {}, {}

    class Spy(Trainer):
        def __init__(self, model, loader, training, **options):
            super().__init__(model, loader, training, **options)
            starts[self.name] = values_of(model)
            loader.set_epoch(2)
            seen[self.name] = [torch.cat([i.flatten() for i in batch]) for batch in loader]

    monkeypatch.setattr(networks_module, "Trainer", Spy)
    hold(tmp_path / "run")
    alone, taught = "resnet8 alone", "resnet8 in the classroom"
    assert same(starts[alone], starts[taught])
    assert torch.equal(torch.stack(seen[alone]), torch.stack(seen[taught]))
    mentors = ("resnet8 (mentor)", "resnet8-2 (mentor)")
    for first, second in ((alone, mentors[0]), mentors):
        assert not same(starts[first], starts[second])
        assert not torch.equal(torch.stack(seen[first]), torch.stack(seen[second]))


def given(path: Path, weight: float = 0.0) -> str:
    """A checkpoint of resnet8 with other statistics, its classifier's bias all ``weight``."""
    torch.manual_seed(0)
    model = create("resnet8", 3)
    nn.init.constant_(model.fc.bias, weight)
    save_network(path, model, NetworkInfo("resnet8", CLASSES, (0.5,) * 3, (0.25,) * 3, 8))
    return str(path)


def test_sick_given_mentor_is_refused_before_training(tmp_path: Path):
    source = given(tmp_path / "mine.safetensors", weight=math.nan)
    with pytest.raises(UserError, match=r"mentor resnet8-2 .*its loss .* is nan") as caught:
        hold(tmp_path / "run", f"mentors=[resnet8,{source}]")
    assert source in str(caught.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_divergence_is_recorded_and_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        "classroomkd.training.trainer.learning_rate",
        lambda training, peak, done: 1e30 if done >= 1 else peak,
    )
    message = r"resnet8 \(mentor\), epoch 2, batch . of 3: .* lower learning rate"
    with pytest.raises(UserError, match=message) as caught:
        hold(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1]
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints" / "mentor-resnet8")
    assert str(checkpoints.newest()) in str(caught.value)
    state = checkpoints.load(print)
    assert (state["epoch"], state["batch"]) == (2, 0)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_full_disk_says_where_the_run_is_and_leaves_the_last_state(tmp_path: Path, monkeypatch):
    out = tmp_path / "run"
    save = Checkpoints.save

    def save_and_fill_the_disk(self, state, step):
        path = save(self, state, step)

        def refuse(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("classroomkd.files.os.fsync", refuse)
        return path

    monkeypatch.setattr(Checkpoints, "save", save_and_fill_the_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        hold(out)
    assert caught.value.filename == str(out)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    (left,) = (out / "checkpoints" / "mentor-resnet8").iterdir()  # nor a temporary file
    assert torch.load(left, weights_only=True)["epoch"] == 2
    monkeypatch.undo()
    summary = hold(out, resume=True)
    assert summary["results"] == hold(tmp_path / "whole")["results"]


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("seed: 5\ndata: {test_share: 0.25}", {"seed": 5, "test_share": 0.25}),
        ("defaults:\n- model: vit", {}),
        ("seed: 5", {}),
        ("seed: five\ndata: {test_share: 0.25}", {}),
        ("seed: true\ndata: {test_share: 0.25}", {}),
        ("seed: -1\ndata: {test_share: 0.25}", {}),
        ("seed: 5\ndata: {test_share: 1.5}", {}),
        ("seed: 5\ndata: digits", {}),
        ("- seed", {}),
        ("", {}),
        ("a: b: c: {", {}),
        ("\x00", {}),
    ],
)
def test_only_a_run_of_ours_tells_the_split(tmp_path: Path, text, split):
    inner = tmp_path / "run" / "mentors"
    inner.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(text)
    for network in (tmp_path / "run", inner.parent / "a.safetensors", inner / "b.safetensors"):
        assert recorded_data(network)[1] == split
    (inner / "config.yaml").write_text("theirs: 1")  # nearer, but not ours
    assert recorded_data(inner / "b.safetensors")[1] == split
    (inner / "config.yaml").unlink()
    (inner / "config.yaml").mkdir()  # nor can it be read
    (inner / "b.safetensors").touch()  # a file, in which there is none
    assert recorded_data(inner / "b.safetensors")[1] == split


def test_a_batch_larger_than_the_training_set_is_told(tmp_path: Path, monkeypatch, states_kept):
    """It is one batch of all images, a step an epoch."""
    text, sizes, step = io.StringIO(), [], Trainer._step
    monkeypatch.setattr(
        Trainer, "_step", lambda self, *batch: sizes.append(len(batch[1])) or step(self, *batch)
    )
    large = recipe("mentors=[]", "method=alone", "training.batch_size=29", "training.epochs=1")
    console = Console(file=text, width=200)
    TrainingRun(large, console).run(colours(28), colours(13, seed=1), tmp_path / "run")
    assert "resnet8 alone: a batch of 29 contains all 28 images" in text.getvalue()
    (state,) = (tmp_path / "run" / "checkpoints" / "alone-resnet8").glob("step-*.pt")
    assert state.name.startswith("step-000000001-")
    assert sizes == [28]
