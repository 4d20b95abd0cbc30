"""The rows of the step benchmark: the training loops and the timing of their parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from baselines import per_mentor_loop
from classroomkd import models
from classroomkd.data import Augmentation, ImageSet, Loader, Loaders
from classroomkd.loss.methods import create
from classroomkd.models import NetworkInfo
from classroomkd.runs.machine import find_precision, keep_freed_memory
from classroomkd.runs.recipe import DataConfig, LossConfig, MentorCacheConfig, Recipe
from classroomkd.training.config import TrainingConfig
from classroomkd.training.evaluation import evaluate, evaluation_loader
from classroomkd.training.graph import CapturedStep
from classroomkd.training.logits_files import KeptLogits
from classroomkd.training.mentor_bank import MentorBank
from classroomkd.training.mentor_cache import CachedMentors
from classroomkd.training.trainer import Trainer
from loader_baselines import TorchvisionTransforms
from loader_rows import PADDING, Setting
from measure import Stopwatch, synchronize

EPOCHS = 240
LEARNING_RATE = 0.01  # does not affect the time, and does not diverge on noise
WARM_UP = 8  # steps; a graph is captured in the fourth

THIS, LOOP = "trainer", "straightforward loop"
CACHED, KEEPING = "trainer, cached mentors", "trainer, keeping mentors' logits"
_KEPT_EPOCHS = 64  # of which a row that keeps logits takes a few
# Name → differences of its recipe from the default.
TRAINERS: dict[str, dict[str, Any]] = {
    THIS: {},
    CACHED: {"mentor_cache": MentorCacheConfig(epochs=1)},  # all of which are kept beforehand
    KEEPING: {"mentor_cache": MentorCacheConfig(epochs=_KEPT_EPOCHS)},
    "trainer, no CUDA graph": {"cuda_graph": False},
    "trainer, float32": {"precision": "float32"},
    "trainer, resident loader": {"data": DataConfig(loader="resident")},
    "trainer, compiled": {"compile": True},
}

MENTORS, FORWARD, LOSS, BACKWARD, OPTIMIZER, STEP = PARTS = (
    *("mentors", "student forward", "loss", "student backward", "optimizer"),
    "step",
)
REST, LOADER = "rest of the step", "loader and between"
NETWORKS = MENTORS, FORWARD, BACKWARD


class StepCase(NamedTuple):
    """A classroom and its batch size."""

    student: str
    mentors: tuple[str, ...]
    batch: int

    @property
    def classroom(self) -> str:
        return f"{self.student} ← {' '.join(self.mentors)}"


# Replaces an attribute by a timed function: owner, name, part.
Patch = Callable[[Any, str, str], None]


def make_networks(
    case: StepCase, setting: Setting, num_classes: int
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Student and mentors with random weights, on the device.

    The mentors' batch norms have the statistics of random images, so that their logits have a
    normal scale and only some mentors are active.
    """
    torch.manual_seed(0)
    student, *mentors = (
        models.create(name, num_classes).to(setting.device)
        for name in (case.student, *case.mentors)
    )
    height, width, _ = setting.shape
    images = torch.randn(64, 3, height, width, device=setting.device)
    with torch.no_grad():
        for mentor in mentors:
            for module in mentor.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = None  # the mean over all batches, here one
            mentor.train()(images)
            mentor.eval()
    return student, dict(zip(case.mentors, mentors, strict=True))


class OurLoop:
    """The trainer as a run makes it."""

    def __init__(self, setting: Setting, case: StepCase, options: dict[str, Any]) -> None:
        training = TrainingConfig(EPOCHS, case.batch, LEARNING_RATE)
        paper = LossConfig(mentor_weight=None, task_weight="confidence")  # as the loop has it
        recipe = Recipe(training=training, loss=paper, **options)
        images = setting.images()
        n_test = len(images) // 5
        self._test = ImageSet(images.images[:n_test], images.targets[:n_test], images.classes)
        self._info = NetworkInfo(
            case.student, images.classes, setting.mean, setting.std, setting.shape[0]
        )
        if setting.device.type == "cpu":
            keep_freed_memory()
        dtype = find_precision(recipe.precision, setting.device)
        student, mentors = make_networks(case, setting, len(images.classes))
        self._loaders = Loaders(recipe.data.loader, [images, self._test], setting.device)
        repeat = recipe.mentor_cache.epochs if recipe.mentor_cache else None

        def opened(drop_last: bool) -> Loader:
            return self._loaders.open(
                images,
                case.batch,
                mean=setting.mean,
                std=setting.std,
                augmentation=Augmentation(PADDING, flip=True),
                shuffle=True,
                drop_last=drop_last,
                repeat=repeat,
                dtype=dtype,
            )

        loader = opened(drop_last=True)
        bank = MentorBank(
            mentors, len(images.classes), device=setting.device, dtype=dtype, compile=recipe.compile
        )
        teachers: MentorBank | CachedMentors = bank
        if repeat:
            key = {"shape": [repeat, len(images), len(images.classes)], "dtype": "float32"}
            folder = setting.folder / f"logits-{repeat}-{case.student}-{case.batch}"

            def cached(cuda_graph: bool) -> CachedMentors:
                files = {name: KeptLogits(folder / name, key) for name in mentors}
                options = {"device": setting.device, "dtype": dtype, "cuda_graph": cuda_graph}
                return CachedMentors(list(mentors), bank, files, **options)

            if repeat == 1:
                _keep(cached(cuda_graph=False), opened(drop_last=False))
            teachers = cached(recipe.cuda_graph)
        self.trainer = Trainer(
            student.to(memory_format=torch.channels_last),
            loader,
            training,
            name=case.student,
            peak=LEARNING_RATE,
            mentors=teachers,
            method=create("classroom", **vars(recipe.loss)),
            dtype=dtype,
            cuda_graph=recipe.cuda_graph,
            compile=recipe.compile,
        )
        self.steps = len(loader)
        self.about = {"loader": self._loaders.backend, "dtype": str(dtype).removeprefix("torch.")}

    def epoch(self, on_step: Callable[[], None]) -> None:
        """Train an epoch; ``on_step`` may end it by raising."""
        self.trainer.train_epoch(on_step)

    def settle(self) -> None:
        """Abandon an unfinished epoch."""
        if self.trainer.batch:
            self.trainer.require_finite()
            self.trainer.sums.zero_()
            self.trainer.epoch, self.trainer.batch = self.trainer.epoch + 1, 0

    def watch(self, patch: Patch) -> None:
        """Time the parts, in a newly captured step."""
        trainer = self.trainer
        if isinstance(trainer.mentors, CachedMentors):
            patch(trainer.mentors, "next", MENTORS)
        else:
            patch(trainer, "mentors", MENTORS)
        patch(trainer, "_forward", FORWARD)
        patch(trainer.method.loss, "loss_and_grad", LOSS)
        patch(torch.Tensor, "backward", BACKWARD)
        patch(trainer.optimizer, "step", OPTIMIZER)
        if isinstance(trainer._step_on, CapturedStep):
            patch(trainer, "_step", STEP)
            trainer._step_on = CapturedStep(trainer._step)
        else:
            patch(trainer, "_step_on", STEP)

    def evaluate(self) -> None:
        """Evaluate the student on a fifth as many images, as after each epoch of a run."""
        evaluate(self.trainer.network, self._test_loader)

    @cached_property
    def _test_loader(self) -> Loader:
        return evaluation_loader(self._loaders, self._test, self._info)


def _keep(mentors: CachedMentors, loader: Loader) -> None:
    """Ask the mentors for all images of the first epoch's augmentation."""
    with loader:
        loader.set_epoch(1)
        mentors.begin(1, loader.upcoming())
        for images, _, _ in loader:
            mentors.next(images)
    mentors.close()


class StraightforwardLoop:
    """The usual loop: float32, mentors one after another, values read back for the log.

    Images come from torchvision's transforms in a DataLoader with one worker per core. The loss
    uses autograd, the optimizer torch's default implementation. cuDNN benchmarks its algorithms.
    """

    def __init__(self, setting: Setting, case: StepCase) -> None:
        torch.backends.cudnn.benchmark = True
        images = setting.images()
        self._network, mentors = make_networks(case, setting, len(images.classes))
        self._mentors = list(mentors.values())
        self.student, self.mentors, self.loss = self._network, self._ask_mentors, per_mentor_loop
        self.optimizer = torch.optim.SGD(
            self._network.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4
        )
        how = setting.how(setting.workers)._replace(batch_size=case.batch, dtype=torch.float32)
        self._loader = TorchvisionTransforms(images, how, torch.contiguous_format)
        self._batches = iter(())
        self.steps = len(images) // case.batch
        self.about = {"loader": "torchvision", "dtype": "float32"}

    def epoch(self, on_step: Callable[[], None]) -> None:
        """Train an epoch; ``on_step`` may end it by raising."""
        self._network.train()
        self._batches = iter(self._loader)
        total_loss = hits = seen = 0
        for images, targets in self._batches:
            loss, right = self.step(images, targets)
            total_loss, hits, seen = total_loss + loss, hits + right, seen + len(targets)
            on_step()

    def step(self, images: Tensor, targets: Tensor) -> tuple[float, int]:
        logits = self.student(images)
        loss = self.loss(logits, self.mentors(images), targets, "sample")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), (logits.argmax(1) == targets).sum().item()

    @torch.no_grad()
    def _ask_mentors(self, images: Tensor) -> list[Tensor]:
        return [mentor(images) for mentor in self._mentors]

    def settle(self) -> None:
        """Let the workers finish their epoch, so that they do not load while others are timed."""
        for _ in self._batches:
            pass

    def watch(self, patch: Patch) -> None:
        """Time the parts."""
        patch(self, "mentors", MENTORS)
        patch(self, "student", FORWARD)
        patch(self, "loss", LOSS)
        patch(torch.Tensor, "backward", BACKWARD)
        patch(self.optimizer, "step", OPTIMIZER)
        patch(self, "step", STEP)


class _EnoughError(Exception):
    """Ends an epoch."""


class RunningStep:
    """A row's training loop, in its own process."""

    def __init__(self, setting: Setting, case: StepCase, name: str, seconds: float) -> None:
        self._setting, self._case, self._name, self._seconds = setting, case, name, seconds

    def open(self) -> dict[str, Any]:
        """Make everything and take the first steps; returns its kind and the seconds it took."""
        begin = time.perf_counter()
        setting = replace(self._setting, batch=self._case.batch)
        if self._name == LOOP:
            self._loop = StraightforwardLoop(setting, self._case)
        else:
            self._loop = OurLoop(setting, self._case, TRAINERS[self._name])
        self._warm_up()
        return self._loop.about | {"start_seconds": time.perf_counter() - begin}

    def _warm_up(self) -> None:
        steps = 0
        while steps < WARM_UP:
            steps += self._train(0.0, at_least=WARM_UP)[0]

    def _train(
        self, seconds: float, look: Callable[[int], None] | None = None, at_least: int = 1
    ) -> tuple[int, float]:
        """Train an epoch or its first ``seconds``; returns the steps and seconds taken."""
        steps, begin = 0, time.perf_counter()

        def on_step() -> None:
            nonlocal steps
            steps += 1
            if look:
                look(steps)
            over = time.perf_counter() - begin >= seconds
            if over and at_least <= steps < self._loop.steps:
                raise _EnoughError

        with suppress(_EnoughError):
            self._loop.epoch(on_step)
        synchronize()
        seconds = time.perf_counter() - begin
        self._loop.settle()
        return steps, seconds

    def round(self) -> float:
        """Time one round, in images per second."""
        steps, seconds = self._train(self._seconds)
        return steps * self._case.batch / seconds

    def gpu_bytes(self) -> int | None:
        """Peak GPU memory reserved by torch; None on a CPU."""
        on_gpu = self._setting.device.type == "cuda"
        return torch.cuda.max_memory_reserved() if on_gpu else None

    def parts(self) -> dict[str, float]:
        """Seconds per step of each part, the time between two steps last."""
        watch, reads = Stopwatch(PARTS, self._setting.device), []
        # Reading the times waits for the GPU, and then leaves it idle.
        every = min(16, self._loop.steps) if self._setting.device.type == "cuda" else 1

        def look(step: int) -> None:
            if step % every == 0:
                reads.append(watch.read())

        with ExitStack() as patched:

            def patch(owner: Any, name: str, part: str) -> None:
                function = watch.timed(part, getattr(owner, name))
                if isinstance(getattr(owner, name), MentorBank):
                    function = _TimedBank(getattr(owner, name), function)
                patched.enter_context(mock.patch.object(owner, name, function))

            self._loop.watch(patch)
            self._warm_up()
            steps, seconds = self._train(self._seconds, look, at_least=every)
        means = {part: sum(r[part] for r in reads) / len(reads) for part in PARTS}
        if self._name in (CACHED, KEEPING):  # whose mentors come before the step
            means[STEP] += means[MENTORS]
        return summed(means, seconds / steps)

    def train_and_evaluate(self) -> tuple[float, float]:
        """Train a whole epoch and evaluate; returns the seconds of both."""
        begin = time.perf_counter()
        self._loop.epoch(lambda: None)
        trained = time.perf_counter()
        self._loop.evaluate()
        synchronize()
        return trained - begin, time.perf_counter() - trained


class _TimedBank:
    """A mentor bank with timed calls."""

    def __init__(self, bank: MentorBank, call: Callable[[Tensor], list[Tensor]]) -> None:
        self.names, self._call = bank.names, call

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, images: Tensor) -> list[Tensor]:
        return self._call(images)


def summed(parts: dict[str, float], period: float) -> dict[str, float]:
    """All parts, which add up to ``period``, the time from one step to the next."""
    step = parts[STEP]
    inner = {part: seconds for part, seconds in parts.items() if part != STEP}
    return inner | {REST: step - sum(inner.values()), LOADER: period - step}
