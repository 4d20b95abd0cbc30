"""A recipe: every value that determines a run, in one YAML file, with overrides by dotted names.

    student: resnet8
    mentors: [resnet20, mobilenetv2]
    data: {source: photos/}
    training: {epochs: 60}

Keys that a file leaves out have the defaults below. These are the published CIFAR recipe, except
``loss.mentor_weight``, which is "auto", so that mentors do no harm with few classes; the packaged
recipes set it to null, the paper's 1. By default mentors are trained for as many epochs as the
student. A mentor is a name or a checkpoint's path; ``nets.py:small=weights.pth`` is a network
defined by the user, with its weights, ``resnet20@60`` is resnet20 after epoch 60 of its training,
and ``{source: resnet20, epochs: 40}`` overrides ``mentor_training.epochs``. The meaning of a key is
the docstring below its field, which ``classroomkd config`` prints (see ``recipe_keys``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from classroomkd.data import NAMED_SOURCES
from classroomkd.errors import UserError, one_line
from classroomkd.limits import Backend
from classroomkd.loss.methods import method_names
from classroomkd.models.network_names import (
    PRETRAINED,
    absolute,
    is_checkpoint,
    is_code,
    is_external,
)
from classroomkd.runs import recipe_layers as layers
from classroomkd.runs.identity import marked, values_without
from classroomkd.runs.recipe_checks import check
from classroomkd.training.config import TrainingConfig

# Earlier defaults, for keys that an old run's config.yaml lacks.
_OF_OLD_RUNS = {"loss": {"mentor_weight": None, "task_weight": "confidence"}}


@dataclass
class DataConfig:
    """The images and their augmentation."""

    source: str = field(default="", metadata=marked("place"))
    """The folder of the images, or the word digits; ``--data``."""
    image_size: int = 32
    """Height and width, in pixels."""
    test_share: float = 0.2
    """The share held out of a data set without a test part, split by the seed."""
    validation: float = 0.1
    """The share of the training images split off by the seed for validation, not used for training.
    A source with ``val/`` beside ``test/`` uses ``val/`` instead; with 0 there is no validation."""
    split_seed: int | None = None
    """The seed of both splits; the recipe's ``seed`` if not given."""
    crop: Literal["pad", "resize"] = "pad"
    """How training images are cropped at random: "pad" decodes all images at the image size and
    crops them with a border; "resize" decodes photographs on use and resizes a random part of
    them, or the centre for evaluation."""
    padding: int | None = None
    """The border of the crop "pad", in pixels; an eighth of the image size if not given."""
    flip: bool | None = None
    """Whether to mirror half of the training images, at random; if not given, for all data but
    digits."""
    cutout: int = 0
    """Side of the erased square in pixels; 0 disables it."""
    mean: list[float] | None = None
    """The mean of each RGB channel, of values scaled to 0..1; if not given, that of the training
    images, or ImageNet's with the crop "resize"."""
    std: list[float] | None = None
    """The standard deviations, likewise; given with ``mean``."""
    loader: Backend = field(default="auto", metadata=marked("machine"))
    """The image loader; "auto" is "ffcv" if installed, else "resident" if the images fit in memory,
    else "torch"."""

    def flips(self) -> bool:
        """Whether training images are mirrored, with ``flip`` resolved if not given."""
        if self.flip is None:
            return self.source not in NAMED_SOURCES or NAMED_SOURCES[self.source].flip
        return self.flip


@dataclass
class LossConfig:
    """The options of the method "classroom", documented in `classroom_loss`."""

    temperature: float = 12.0
    ranking: Literal["sample", "batch"] = "sample"
    knowledge_filter: Literal["better", "correct", "correct_and_better", "none"] = "better"
    mentoring: Literal["adaptive", "fixed", "none", "dtkd"] = "adaptive"
    weighting: Literal["rank", "uniform", "confidence"] = "rank"
    mentor_weight: float | str | None = "auto"
    task_weight: float | str = 1.0
    rank_decimals: int | None = None
    label_smoothing: float = 0.0
    standardise: bool = False


@dataclass
class MentorConfig:
    """A mentor: a name or a checkpoint, its weights, and exceptions to the usual training."""

    source: str = MISSING
    """A network of the zoo, tv:NAME, timm:NAME, FILE.py:NAME, package.module:NAME, a checkpoint or
    a run folder."""
    epochs: int | None = None
    """The length of its schedule in epochs; ``mentor_training.epochs`` if not given."""
    at: int | None = None
    """The epoch of that schedule whose weights are used; the last if not given."""
    weights: str | None = None
    """The file of the network's weights, or "pretrained" for its library's. With epochs, training
    starts from these, with a new classifier if theirs is for other classes; otherwise the mentor is
    used without training."""
    mean: list[float] | None = None
    """The mean of each RGB channel, of values scaled to 0..1, for the mentor's images; if not
    given, that in its file, or else the student's."""
    std: list[float] | None = None
    """The standard deviations, likewise; given with ``mean``."""


@dataclass
class MentorCacheConfig:
    """The cache of mentors' logits."""

    epochs: int | None = None
    """The number of epochs after which the augmentation of the student's images repeats, and thus
    the number of epochs kept; null never repeats. The order of the images does not repeat."""
    dtype: Literal["float32", "float16"] = "float32"
    """The dtype of the logits: float32 gives exactly the student trained without a cache; float16
    takes half the space, and rounds."""


@dataclass
class Recipe:
    """A run. Building one through `load_recipe` checks every value.

    Without a ``student`` only the mentors are trained.
    """

    student: str = ""
    """A network of the zoo, tv:NAME, timm:NAME, FILE.py:NAME or package.module:NAME; ``--student``.
    A file may give {source, weights, mean, std, epochs} instead, for this key, ``init``,
    ``data.mean``, ``data.std`` and ``training.epochs``."""
    init: str | None = None
    """The student's initial weights: a checkpoint of this network, or "pretrained" for its
    library's, with a new classifier if theirs is for other classes. Random if not given;
    ``--init``."""
    mentors: list[MentorConfig] = field(default_factory=list, metadata=marked("teaching"))
    """The mentors; methods with a single mentor use the first; ``--mentors``."""
    method: str = field(default="classroom", metadata=marked("teaching"))
    """The student's training method; ``classroomkd methods`` lists the methods."""
    method_options: dict[str, Any] = field(default_factory=dict, metadata=marked("teaching"))
    """The options of methods other than "classroom", whose options are under ``loss``."""
    alone: bool = field(default=True, metadata=marked("teaching"))
    """Whether the student is also trained without mentors, for comparison."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mentor_training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(learning_rate=None, schedule="steps"),
        metadata=marked("teaching"),
    )
    loss: LossConfig = field(default_factory=LossConfig, metadata=marked("teaching"))
    seed: int = field(default=0, metadata=marked("seed"))
    """The seed of initial weights, batches, augmentation and splits."""
    mentor_seed: int | None = field(default=None, metadata=marked("teaching"))
    """The seed of the mentors' weights and batches; ``seed`` if not given."""
    data_seed: int | None = None
    """The seed of the student's batches and augmentation; derived from ``seed`` if not given.
    Students that share it share cached mentors."""
    mentor_cache: MentorCacheConfig | None = None
    """The cache of mentors' logits, shared by all students with the same images in the same
    batches; any of its keys turns it on."""
    device: str | None = field(default=None, metadata=marked("machine"))
    """The device, as torch names it; if not given, the GPU if there is one, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata=marked(mentors=True)
    )
    """The dtype of activations; "auto" is bfloat16 on GPUs that support it."""
    compile: bool = field(default=False, metadata=marked(mentors=True))
    """Whether student and mentors are compiled by torch.compile."""
    cuda_graph: bool = True
    """Whether the training step is captured in a CUDA graph on a GPU."""
    ranking_across_processes: bool = field(default=True, metadata=marked("teaching"))
    """Whether ranking "batch" averages over the whole batch instead of each process's share."""
    store: bool = field(default=True, metadata=marked("machine"))
    """Whether trained mentors are stored in the cache folder and reused from there."""
    strict: bool = field(default=False, metadata=marked("machine"))
    """Whether a run stops before training if a given mentor has a fault (classroomkd check)."""
    tensorboard: bool = field(default=False, metadata=marked("machine"))
    """Whether records are also written for TensorBoard, into tensorboard/ in the run folder."""
    threads: int | None = field(default=None, metadata=marked("machine", mentors=True))
    """The number of CPU threads, on which a run's bits depend; torch's default if not given."""
    checkpoint_epochs: int = field(default=1, metadata=marked("machine"))
    """The number of epochs between saves of the training state."""
    checkpoint_minutes: float = field(default=5.0, metadata=marked("machine"))
    """The number of minutes after which it is also saved within an epoch."""
    checkpoint_keep: int = field(default=2, metadata=marked("machine"))
    """The number of training states kept until the training is done."""


def load_recipe(
    file: Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    *,
    of_run: bool = False,
) -> Recipe:
    """The recipe given by a YAML file, by ``values``, or both, and by dotted overrides.

    ``overrides`` are like ``training.epochs=60`` or ``mentors=[resnet20,resnet8]``, and win. With
    ``of_run`` the file is the config.yaml of a run, possibly of an earlier version: missing keys
    have the defaults of that version.

    Raises UserError, in one line that names the value, for an unknown key or an invalid value.
    """
    where = f"{file}: " if file else ""
    recipe = _read(file, overrides, values, of_run, where)
    check(recipe, where)
    data = recipe.data
    if data.padding is None:
        data.padding = data.image_size // 8
    data.flip = data.flips()
    if data.crop == "resize" and data.mean is None:
        data.mean, data.std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    if data.source not in ("", *NAMED_SOURCES):
        data.source = str(Path(data.source).expanduser().absolute())
    return recipe


def split_seed(recipe: Recipe) -> int:
    """The seed that splits off test and validation images."""
    return recipe.seed if recipe.data.split_seed is None else recipe.data.split_seed


def mentor_seed(recipe: Recipe) -> int:
    """The seed of the mentors' weights and batches."""
    return recipe.seed if recipe.mentor_seed is None else recipe.mentor_seed


def kept_epochs(recipe: Recipe) -> int:
    """The number of the student's epochs with different augmentation."""
    repeat, epochs = recipe.mentor_cache and recipe.mentor_cache.epochs, recipe.training.epochs
    return min(repeat or epochs, epochs)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, for YAML."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(recipe)))


def teaching(recipe: Recipe) -> list[MentorConfig]:
    """The mentors that the method asks for: all, the first one, or none; all without a student."""
    if not recipe.student:
        return recipe.mentors
    if recipe.method == "alone":
        return []
    return recipe.mentors[:1] if method_names.entry(recipe.method).single_mentor else recipe.mentors


def is_given(mentor: MentorConfig) -> bool:
    """Whether the mentor is used without training in the run."""
    has_weights = mentor.weights is not None or is_external(mentor.source)
    return (
        mentor.epochs is None
        and mentor.at is None
        and (has_weights or is_checkpoint(mentor.source))
    )


def code_sources(recipe: Recipe) -> list[str]:
    """The networks of a run that are defined by user code, each once."""
    sources = (recipe.student, *(mentor.source for mentor in teaching(recipe)))
    return list(dict.fromkeys(filter(is_code, sources)))


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe, with paths of networks and weights that are valid in any working folder."""
    mentors = [
        replace(mentor, source=absolute(mentor.source), weights=_absolute_weights(mentor.weights))
        for mentor in recipe.mentors
    ]
    init = _absolute_weights(recipe.init)
    return replace(recipe, student=absolute(recipe.student), init=init, mentors=mentors)


def result_values(recipe: Recipe) -> dict[str, Any]:
    """The values that determine the results of a run on given images, seed included."""
    values = values_without(with_absolute_paths(recipe), "machine", "place")
    if not recipe.student or recipe.method != "classroom":
        del values["loss"]  # unused
    return values


def _absolute_weights(weights: str | None) -> str | None:
    if weights in (None, PRETRAINED):
        return weights
    return str(Path(weights).expanduser().absolute())


def _read(
    file: Path | None,
    overrides: Sequence[str],
    values: Mapping[str, Any] | None,
    of_run: bool,
    where: str,
) -> Recipe:
    """The recipe as given, before its values are checked; errors begin with ``where``."""
    method, item = "", ""
    try:
        files = () if file is None else layers.read_with_bases(file)
        merged = deepcopy(_begun(files, of_run))
        if values is not None:
            merged = _merged(merged, layers.layer(values))
        chosen = [item.partition("=")[2] for item in overrides if item.startswith("method=")]
        method = chosen[-1] if chosen else merged.method
        for item in overrides:
            _override(merged, item, where)
        if OmegaConf.is_missing(merged.mentor_training, "epochs"):
            merged.mentor_training.epochs = merged.training.epochs
        recipe = cast(Recipe, OmegaConf.to_object(merged))
        _require_used_loss(recipe, overrides, where)
        recipe.method_options = _typed_options(recipe)
        return recipe
    except UserError:
        raise
    except (ConfigKeyError, ConfigAttributeError) as error:
        from classroomkd.runs.recipe_keys import unknown_key  # which reads this module

        raise UserError(f"{where}{unknown_key(error.full_key or '', method, item)}") from None
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{where}{layers.reason(error)}") from None


def _require_used_loss(recipe: Recipe, overrides: Sequence[str], where: str) -> None:
    """Raise UserError for an override of loss with a method that does not use it.

    A file may set loss and have its method overridden.
    """
    idle = [item for item in overrides if re.match(r"loss[.=]", item)]
    if idle and recipe.method != "classroom":
        from classroomkd.runs.recipe_keys import unused_loss  # which reads this module

        raise UserError(f"{where}{unused_loss(idle[0], recipe.method)}")


def _typed_options(recipe: Recipe) -> dict[str, Any]:
    """The options of the method, with texts such as 1e-1 read as numbers where they should be.

    OmegaConf does so itself where it knows the type; PyYAML reads 1e-1 as text.
    """
    known = method_names.entry(recipe.method).options
    texts = {key for key, default in known.items() if isinstance(default, str)}
    return {
        key: layers.value_of(value) if isinstance(value, str) and key not in texts else value
        for key, value in recipe.method_options.items()
    }


def _override(merged: DictConfig, item: str, where: str) -> None:
    """Apply an override like ``training.epochs=60``; UserError if it cannot be read."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"an override is like training.epochs=60, not {item!r}")
    try:
        layers.override(merged, key, layers.value_of(text))
    except OmegaConfBaseException:  # which may be a ValueError too, and names the key
        raise
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{where}cannot take the override {item!r}: {one_line(error)}") from None


@cache  # merging is slow, and a plan of many runs has few files
def _begun(files: tuple[tuple[Path, bytes], ...], of_run: bool) -> DictConfig:
    """The defaults with the files' values; mentors' epochs are missing unless a file has them."""
    if not files:
        defaults = OmegaConf.structured(Recipe)
        defaults.mentor_training.epochs = MISSING
        return _merged(defaults, _OF_OLD_RUNS) if of_run else defaults
    values = layers.yaml_mapping(*files[-1])
    values.pop("base", None)
    return _merged(_begun(files[:-1], of_run), layers.layer(values))


def _merged(base: DictConfig, values: Any) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(base, values))
