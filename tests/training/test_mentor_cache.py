"""Mentors whose logits are in files teach what they would teach themselves, and are not run."""

import copy

import numpy as np
import pytest
import torch

from classroomkd.data import Augmentation, Mixing
from classroomkd.data.augmentation import sample_order
from classroomkd.loss.methods import create
from classroomkd.models import create as create_network
from classroomkd.training.config import TrainingConfig
from classroomkd.training.logits_files import KeptLogits, OwnLogits
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.mentor_cache import CachedMentors
from classroomkd.training.trainer import Trainer
from fake_cuda import CUDA, FakeCuda
from loader_cases import ALL
from small_runs import colours, same, values_of

EPOCHS, COUNT, BATCH = 2, 28, 8  # the last four images of each epoch's order are left out
NAMES = ["one", "two"]
CPU = torch.device("cpu")


class StoppedError(Exception):
    """Ends a training within an epoch."""


@pytest.fixture(scope="module")
def networks():
    """A student, and mentors with statistics that are not their first."""
    torch.manual_seed(0)
    student, *mentors = (create_network(name, 3) for name in ("resnet8", "resnet8", "resnet14"))
    with torch.no_grad():
        for mentor in mentors:
            mentor.train()(torch.randn(16, 3, 8, 8))
    return student, dict(zip(NAMES, mentors, strict=True))


class Runs:
    """Trainings of one student with the same loader and mentors."""

    def __init__(self, folder, make, networks, kind="resident", **options):
        self.folder, self.asked = folder, []
        self._student, self._mentors = networks
        self._make = lambda: make(kind, colours(COUNT), BATCH, drop_last=True, seed=5, **options)
        self.told = []

    def cached(self, dtype="float32", epochs=EPOCHS, **sources):
        key = {"shape": [epochs, COUNT, 3], "dtype": dtype}
        bank = MentorBank(self._mentors, 3, device=CPU)
        ask = bank.__call__

        def spy(images, names=None):
            self.asked.append((tuple(names), len(images)))
            return ask(images, names)

        kept = {name: KeptLogits(self.folder / f"{name}-{dtype}", key) for name in NAMES}
        return CachedMentors(
            NAMES, spy, kept | sources, device=CPU, dtype=torch.float32, notify=self.told.append
        )

    def train(self, mentors=None, stop_at=None, state=None, epochs=EPOCHS):
        """The student's weights at the end, or the state after ``stop_at`` steps of epoch 2."""
        torch.manual_seed(0)
        own = mentors or MentorBank(self._mentors, 3, device=CPU)
        trainer = Trainer(
            copy.deepcopy(self._student),
            self._make(),
            TrainingConfig(epochs, BATCH),
            name="student",
            peak=0.05,
            method=create("classroom"),
            mentors=own,
        )
        if state is not None:
            trainer.load_state_dict(state)
        steps = 0

        def on_step():
            nonlocal steps
            steps += 1
            if trainer.epoch == 2 and trainer.batch == stop_at:
                raise StoppedError

        try:
            while trainer.epoch <= epochs:
                trainer.train_epoch(on_step)
        except StoppedError:
            return copy.deepcopy(trainer.state_dict())
        finally:
            if mentors:
                mentors.close()
        return values_of(trainer.network)


@pytest.mark.parametrize("kind", ALL)
def test_float32_gives_the_very_bits(tmp_path, make, networks, kind):
    """With each loader, while written, over a resumption within an epoch, and read."""
    runs = Runs(tmp_path, make, networks, kind)
    without = runs.train()
    state = runs.train(runs.cached(), stop_at=1)
    assert runs.asked == [(("one", "two"), BATCH)] * 4
    runs.asked.clear()
    assert same(without, runs.train(runs.cached(), state=state))
    # The first batch of the second epoch was kept before the stop.
    assert runs.asked == [(("one", "two"), BATCH)] * 2
    runs.asked.clear()
    assert same(without, runs.train(runs.cached()))
    assert not runs.asked
    assert not runs.told


def test_a_resumption_before_what_was_kept_gives_the_same_bits(tmp_path, make, networks):
    """A killed process has kept more than its last checkpoint knows."""
    runs = Runs(tmp_path, make, networks)
    without = runs.train()
    state = runs.train(stop_at=1)
    runs.train(runs.cached())
    assert same(without, runs.train(runs.cached(), state=state))


def test_mixed_images(tmp_path, make, networks):
    runs = Runs(tmp_path, make, networks, mixing=Mixing(3, mixup=0.4, cutmix=1.0))
    without = runs.train()
    assert same(without, runs.train(runs.cached()))
    runs.asked.clear()
    assert same(without, runs.train(runs.cached()))
    assert not runs.asked


def test_float16_teaches_the_rounded_logits_from_the_first_run_on(tmp_path, make, networks):
    """So who asked the mentors does not matter; and float16 takes half the bytes."""
    runs = Runs(tmp_path, make, networks)
    first = runs.train(runs.cached("float16"))
    assert runs.asked
    runs.asked.clear()
    assert same(first, runs.train(runs.cached("float16")))
    assert not runs.asked
    assert not same(first, runs.train())


def test_damage_is_named_and_answered_anew(tmp_path, make, networks):
    runs = Runs(tmp_path, make, networks)
    without = runs.train(runs.cached())
    sample = int(sample_order(5, 1, COUNT)[0])
    np.load(tmp_path / "two-float32" / "logits.npy", mmap_mode="r+")[0, sample] = 7.0
    runs.asked.clear()
    assert same(without, runs.train(runs.cached()))
    assert runs.asked == [(("two",), BATCH)]
    (line,) = runs.told
    assert f"{tmp_path / 'two-float32'} is damaged in epoch 1: mentor two" in line
    runs.asked.clear()
    assert same(without, runs.train(runs.cached()))
    assert not runs.asked


def test_repeated_augmentation_comes_in_a_new_order(tmp_path, make, networks):
    """After two epochs only samples that were left out of both are asked for."""
    options = {"repeat": 2, "augmentation": Augmentation(2, True)}
    runs = Runs(tmp_path, make, networks, **options)
    first = runs.train(runs.cached(), epochs=4)
    left_out = [set(sample_order(5, epoch, COUNT)[24:].tolist()) for epoch in (1, 2, 3, 4)]
    assert left_out[0] != left_out[2]
    assert 6 < len(runs.asked) < 12
    known = [np.load(tmp_path / "one-float32" / "tags.npy")[epoch] != 0 for epoch in (0, 1)]
    for epoch in (0, 1):
        assert set(np.flatnonzero(~known[epoch])) == left_out[epoch] & left_out[epoch + 2]
    runs.asked.clear()
    assert same(first, runs.train(runs.cached(), epochs=4))
    assert not runs.asked
    loader = make("resident", colours(COUNT), BATCH, **options)
    batches = {}
    for epoch in (1, 2, 3):
        loader.set_epoch(epoch)
        for images, _, samples in loader:
            batches |= {(epoch, s): im for s, im in zip(samples.tolist(), images, strict=True)}
    for sample in range(COUNT):
        assert torch.equal(batches[1, sample], batches[3, sample])
    assert not all(torch.equal(batches[1, s], batches[2, s]) for s in range(COUNT))


def test_two_runs_at_once(tmp_path, make, networks):
    """One writes; the other reads what is there, and both end alike."""
    runs = Runs(tmp_path, make, networks)
    without = runs.train()
    writer, reader = runs.cached(), runs.cached()
    assert same(without, runs.train(writer))
    runs.asked.clear()
    assert same(without, runs.train(reader))
    assert not runs.asked


def test_logits_of_ones_own_are_taught(tmp_path, make, networks):
    """One answer for each image, in whatever order these come."""
    values = np.random.default_rng(0).standard_normal((1, COUNT, 3)).astype(np.float32)
    np.save(tmp_path / "own.npy", values)
    runs = Runs(tmp_path, make, networks)
    cached = runs.cached(two=OwnLogits(tmp_path / "own.npy"))
    loader = make("resident", colours(COUNT), BATCH, seed=5)
    loader.set_epoch(3)
    cached.begin(1, loader.upcoming())
    for images, _, samples in loader:
        _, two = cached.next(images)
        assert torch.equal(two, torch.from_numpy(values[0])[samples])
    cached.close()
    assert {names for names, _ in runs.asked} == {("one",)}


def test_a_mentor_that_is_not_finite_is_named(tmp_path, make, networks):
    values = np.full((1, COUNT, 3), np.nan, np.float32)
    np.save(tmp_path / "own.npy", values)
    runs = Runs(tmp_path, make, networks)
    with pytest.raises(Exception, match="neither are the logits of mentor two"):
        runs.train(runs.cached(two=OwnLogits(tmp_path / "own.npy")))


def test_a_full_disk_is_reported(tmp_path, make, networks, monkeypatch):
    """An error while writing behind is not lost."""

    def full(*_):
        raise OSError(28, "No space left on device", "logits.npy")

    runs = Runs(tmp_path, make, networks)
    monkeypatch.setattr(KeptLogits, "write", full)
    with pytest.raises(OSError, match="No space left"):
        runs.train(runs.cached())


def test_on_a_gpu_mentors_are_replayed_and_their_logits_copied(
    tmp_path, make, networks, monkeypatch
):
    """As far as a stand-in for a GPU shows it: what is kept and given is each batch's own."""
    _, mentors = networks
    images, bank = torch.randn(7, 4, 3, 8, 8), MentorBank(mentors, 3, device=CPU)
    expected = [[outputs.logits for outputs in bank(batch)] for batch in images]
    batches = list(np.arange(28).reshape(7, 4))
    key = {"shape": [1, 28, 3], "dtype": "float32"}
    cuda = FakeCuda(monkeypatch)
    with cuda.on_cuda():
        bank = MentorBank(mentors, 3, device=CUDA)
        for replays in (4, 0):  # three batches come before the capture
            cuda.calls.clear()
            kept = {name: KeptLogits(tmp_path / name, key) for name in NAMES}
            cached = CachedMentors(NAMES, bank, kept, device=CUDA, dtype=torch.float32)
            cached.begin(1, batches)
            for batch, right in zip(images, expected, strict=True):
                for logits, own in zip(cached.next(batch), right, strict=True):
                    assert torch.equal(logits, own)
            cached.close()
            assert cuda.calls["replay"] == replays


def test_the_bank_asks_the_mentors_that_are_named(networks):
    _, mentors = networks
    bank, images = MentorBank(mentors, 3, device=CPU), torch.randn(4, 3, 8, 8)
    both = bank(images)
    for index, name in enumerate(NAMES):
        (one,) = bank(images, [name])
        assert torch.equal(one.logits, both[index].logits)
