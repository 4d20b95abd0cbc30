"""`distill`: what ``classroomkd train`` does, for modules and data given in Python."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from classroomkd.data import ImageFiles, ImageSet, from_dataset, split_off
from classroomkd.data.batches import Batches, first_batch
from classroomkd.errors import UserError
from classroomkd.limits import LARGEST_SIDE
from classroomkd.report.run_table import results_table
from classroomkd.runs.builder import outputs_of
from classroomkd.runs.identity import difference
from classroomkd.runs.images import AnyPart
from classroomkd.runs.paths import choose_folder
from classroomkd.runs.recipe import Recipe, load_recipe, result_values, split_seed
from classroomkd.runs.training_run import TrainingRun


class Distilled(NamedTuple):
    """A trained student, in eval mode on its device, and the content of its run's summary.json."""

    student: nn.Module
    summary: dict[str, Any]


def distill(
    student: nn.Module | str,
    mentors: Mapping[str, Any] | Sequence[Any],
    train: Any,
    test: Any = None,
    *,
    epochs: int,
    out: str | Path | None = None,
    method: str = "classroom",
    method_options: Mapping[str, Any] | None = None,
    loss: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    validation: Any = None,
    resume: bool = False,
    quiet: bool = False,
    **recipe: Any,
) -> Distilled:
    """Train ``student`` with ``mentors``, as ``classroomkd train`` does.

    Data is an `ImageSet`, or a map-style data set of (image, class index) that becomes one (see
    `from_dataset`), and goes through the library's loaders, with a new augmentation each epoch. Or
    it is a DataLoader of (images, targets): then the student trains on its batches as they come, of
    images [B, …] of any shape and class indices [B], without augmentation, normalisation or sample
    indices. torch's seed, and that of the DataLoader's own generator, are set at the start of each
    epoch from ``seed``; such a run resumes at the end of an epoch, others at any batch.

    Modules are copied: those given are not changed.

    Args:
        student: a module that maps images to logits [B, C], which is trained from its weights, or a
            name as ``classroomkd train --student`` takes it.
        mentors: name to module, to a network or checkpoint as ``--mentors`` takes it, or to a
            mapping like {"source": module, "mean": […], "std": […]} with the keys of a mentor in a
            recipe; or a sequence of these. Modules teach as they are, in eval mode, unless they are
            given "epochs", and get images normalised as the student does where they have no "mean".
        train: what the student learns from.
        test: what it is measured on; None holds out ``data.test_share`` of ``train``, not of a
            DataLoader.
        epochs: of the student, and of mentors that are trained and say nothing else.
        out: the run folder, with records, checkpoints and report; None keeps none of it.
        method: what ``classroomkd methods`` lists.
        method_options: its options.
        loss: those of the method "classroom", like {"temperature": 4.0}.
        seed: of initial weights, batches, augmentation and splits.
        device: as torch names it; None is the GPU if there is one.
        validation: what the best epoch is chosen on; None splits off ``data.validation`` of
            ``train``, not of a DataLoader.
        resume: whether to resume the run in ``out``, if there is one, or give its result if it
            is finished; the arguments must be the same.
        quiet: print nothing.
        **recipe: other keys of a recipe, like training={"batch_size": 128, "learning_rate": 0.1},
            data={"flip": False} or alone=True, to train the student without mentors too.

    Returns:
        The trained student and the summary of the run.

    Raises:
        UserError: something cannot be used, in one line that says what and why.

    """
    networks = _Networks()
    values: dict[str, Any] = {"alone": False, **recipe}
    values |= {
        "student": networks.student(student, mentors),
        "mentors": networks.mentors(mentors),
        "method": method,
        "seed": seed,
        "device": None if device is None else str(device),
    }
    if not values["mentors"] and method != "alone":
        raise UserError(f"method {method} needs mentors: give some, or method='alone'")
    if method_options:
        values["method_options"] = dict(method_options)
    if loss:
        values["loss"] = dict(loss)
    parts = _parts(train, test, validation, networks)
    _settings(values, epochs, parts)
    loaded = load_recipe(values=values)
    train_set = parts["train"]
    if "test" not in parts:
        assert not isinstance(train_set, Batches)  # as `_parts` sees to
        parts["train"], parts["test"] = split_off(
            train_set, loaded.data.test_share, split_seed(loaded)
        )
    console = Console(quiet=quiet)
    with ExitStack() as opened:
        begun = resume and out is not None and (Path(out) / "config.yaml").exists()
        temporary = out is None
        if out is None:
            out = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "run"
        folder = Path(out) if begun else choose_folder(Path(out), "")
        run = TrainingRun(loaded, console, networks.modules)
        if begun:
            _require_same(run.recipe, folder)
            if (folder / "summary.json").exists():
                return _finished(run, folder)
        summary = run.run(
            parts["train"],
            parts["test"],
            folder,
            begun,
            validation_set=parts.get("validation"),
            temporary=temporary,
        )
    console.print(results_table(summary))
    trained = run.students["alone" if method == "alone" else "student"]
    return Distilled(trained.eval(), summary)


@dataclass
class _Networks:
    """The modules among the arguments, by the names that the recipe has for them."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    mentor_names: list[str] = field(default_factory=list)

    def student(self, student: nn.Module | str, mentors: Any) -> str:
        """The recipe's name for the student."""
        if isinstance(student, str):
            return student
        if not isinstance(student, nn.Module):
            raise UserError(
                f"the student must be a torch.nn.Module or a name, not {type(student).__name__}"
            )
        name = type(student).__name__
        while isinstance(mentors, Mapping) and name in mentors:
            name += "-student"
        self.modules[name] = student
        return name

    def mentors(self, mentors: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
        """The recipe's entries for the mentors."""
        if isinstance(mentors, str | nn.Module):
            mentors = [mentors]
        if isinstance(mentors, Mapping):
            return [self._mentor(name, mentor) for name, mentor in mentors.items()]
        taken = Counter(self.modules.keys())  # a Counter of the mapping would count its values
        entries = []
        for mentor in mentors:
            source = mentor.get("source") if isinstance(mentor, Mapping) else mentor
            name = type(source).__name__
            taken[name] += 1
            entries.append(
                self._mentor(name if taken[name] == 1 else f"{name}-{taken[name]}", mentor)
            )
        return entries

    def _mentor(self, name: str, mentor: Any) -> Any:
        options = dict(mentor) if isinstance(mentor, Mapping) else {"source": mentor}
        source = options.get("source")
        if isinstance(source, str):
            return options if isinstance(mentor, Mapping) else source
        if not isinstance(source, nn.Module):
            raise UserError(
                f"the mentor {name} must be a torch.nn.Module, a name or a mapping with a source, "
                f"not {type(source).__name__}"
            )
        if not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(f"a mentor's name is of letters, digits, _ and -, not {name!r}")
        if "weights" in options:
            raise UserError(f"the mentor {name} is a module: load its weights into it")
        self.modules[name] = source
        self.mentor_names.append(name)
        return options | {"source": name}


def _parts(train: Any, test: Any, validation: Any, networks: _Networks) -> dict[str, AnyPart]:
    """The parts of the images that are given, by name."""
    given = {"train": train, "test": test, "validation": validation}
    given = {name: part for name, part in given.items() if part is not None}
    loaders = [name for name, part in given.items() if isinstance(part, DataLoader)]
    if not loaders:
        return {name: _image_set(part, name) for name, part in given.items()}
    if len(loaders) < len(given):
        other = next(name for name in given if name not in loaders)
        raise UserError(f"{loaders[0]} is a DataLoader and {other} is not: give either for all")
    if test is None:
        raise UserError("test is missing: the batches of a DataLoader cannot be split")
    classes = _classes(train, networks)
    return {name: Batches(part, classes, name) for name, part in given.items()}


def _image_set(part: Any, name: str) -> ImageSet | ImageFiles:
    if isinstance(part, ImageSet | ImageFiles):
        return part
    if isinstance(part, str | Path):
        raise UserError(
            f"{name} must be data, not the path {part}: read it with classroomkd.data.load_source"
        )
    if not hasattr(part, "__getitem__") or not hasattr(part, "__len__"):
        raise UserError(
            f"{name} must be an ImageSet, a map-style data set or a DataLoader, not "
            f"{type(part).__name__}"
        )
    try:
        return from_dataset(part)
    except UserError as error:
        raise UserError(f"{name}: {error}; or give a DataLoader of it") from None


def _classes(train: DataLoader, networks: _Networks) -> list[str]:
    """The names of the classes; their numbers where the data set has none."""
    if known := getattr(train.dataset, "classes", None):
        return [str(name) for name in known]
    images, targets = first_batch(train, "train")
    if targets.dim() == 2:
        return [str(number) for number in range(targets.shape[1])]
    counts = {}
    for name, module in networks.modules.items():
        what = f"{'mentor' if name in networks.mentor_names else 'the student'} {name}"
        was_training = module.training
        device = next((tensor.device for tensor in module.parameters()), images.device)
        try:
            with torch.no_grad():
                counts[what] = outputs_of(module.eval(), images[:2].to(device), what)
        finally:
            module.train(was_training)
    if not counts:
        raise UserError("the number of classes is not known: give the data set a list `classes`")
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{what} has {count} outputs" for what, count in counts.items())
        raise UserError(f"the networks have different numbers of classes: {said}")
    return [str(number) for number in range(max(counts.values()))]


def _settings(values: dict[str, Any], epochs: int, parts: Mapping[str, AnyPart]) -> None:
    """Fill in what follows from the number of epochs and from the data."""
    train = parts["train"]
    training = {"epochs": epochs, **(values.get("training") or {})}
    data = dict(values.get("data") or {})
    if isinstance(train, Batches):
        for key in ("mixup", "cutmix"):
            if training.get(key):
                raise UserError(f"training.{key} mixes known samples, not a DataLoader's batches")
        if data:
            raise UserError(
                f"data: {next(iter(data))} has no meaning for the batches of a DataLoader"
            )
        training.setdefault("batch_size", train.batch_size)
        side = train.example.shape[-1] if train.example.dim() == 4 else 1
        data |= {"image_size": min(side, LARGEST_SIDE), "mean": [0.0] * 3, "std": [1.0] * 3}
        data["validation"] = 0.1 if "validation" in parts else 0.0
    elif isinstance(train, ImageSet):
        data.setdefault("image_size", train.images.shape[1])
    else:
        data.setdefault("crop", "resize")
    values |= {"training": training, "data": data}


def _require_same(recipe: Recipe, folder: Path) -> None:
    """Raise UserError if the run in ``folder`` was started with other arguments."""
    begun = load_recipe(folder / "config.yaml", of_run=True)
    if differing := difference(result_values(begun), result_values(recipe)):
        raise UserError(
            f"{folder} was started with {differing} now: give the same arguments, or another out"
        )


def _finished(run: TrainingRun, folder: Path) -> Distilled:
    """The student and the summary of a run that is finished."""
    summary = json.loads((folder / "summary.json").read_bytes())
    name = "student_alone" if run.recipe.method == "alone" else "student"
    network = run.builder.load(folder / f"{name}.safetensors", run.recipe.student)
    return Distilled(network.to(run.device).eval(), summary)
