"""The ranges of a recipe's values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from classroomkd.errors import UserError
from classroomkd.limits import ALPHAS, LARGEST_SIDE, is_alpha
from classroomkd.loss.methods import method_names
from classroomkd.loss.options import LossOptions
from classroomkd.models.network_names import is_checkpoint, is_logits

if TYPE_CHECKING:
    from classroomkd.runs.recipe import DataConfig, MentorConfig, Recipe
    from classroomkd.training.config import TrainingConfig


Requirement = tuple[str, object, bool, str]
"""A key, its value, whether that is in its range, and the range in words."""


def check(recipe: Recipe, where: str) -> None:
    """Raise UserError for a value outside its range."""
    required = [
        *_of_run(recipe),
        *_of_data(recipe.data),
        *_of_training("training", recipe.training),
        *_of_training("mentor_training", recipe.mentor_training),
    ]
    for index, mentor in enumerate(recipe.mentors):
        name, epochs = f"mentors.{index}", mentor.epochs or recipe.mentor_training.epochs
        required += _of_mentor(name, mentor, epochs)
        if is_logits(mentor.source):
            given = {key: of for key, of in vars(mentor).items() if key != "source"}
            if key := next((key for key, of in given.items() if of is not None), None):
                raise UserError(
                    f"{where}{name}.{key}: {mentor.source} holds logits, which have none"
                )
        if mentor.weights is not None and is_checkpoint(mentor.source):
            raise UserError(
                f"{where}{name}.weights: {mentor.source} is a checkpoint itself; give the "
                "network's name as source"
            )
    for key, value, fine, wanted in required:
        if not fine:
            raise UserError(f"{where}{key} must be {wanted}, not {value}")
    try:
        LossOptions(**{k: v for k, v in vars(recipe.loss).items() if k != "standardise"})
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}loss: {error}") from None
    if recipe.method == "classroom" and recipe.method_options:
        names = ", ".join(recipe.method_options)
        raise UserError(
            f"{where}method_options: the classroom's options are under loss, not {names}"
        )
    try:
        method_names.check(recipe.method, recipe.method_options)
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def _of_run(recipe: Recipe) -> list[Requirement]:
    threads, cache = recipe.threads, recipe.mentor_cache
    required: list[Requirement] = [
        ("mentors", len(recipe.mentors), len(recipe.mentors) <= 16, "at most 16"),
        ("init", repr(""), recipe.init != "", "a file"),
        ("seed", recipe.seed, recipe.seed >= 0, "a whole number of at least 0"),
        ("mentor_seed", recipe.mentor_seed, (recipe.mentor_seed or 0) >= 0, "at least 0"),
        ("data_seed", recipe.data_seed, (recipe.data_seed or 0) >= 0, "at least 0"),
        ("checkpoint_keep", recipe.checkpoint_keep, recipe.checkpoint_keep >= 1, "at least 1"),
        ("checkpoint_epochs", recipe.checkpoint_epochs, recipe.checkpoint_epochs >= 1, "≥ 1"),
        ("checkpoint_minutes", recipe.checkpoint_minutes, recipe.checkpoint_minutes > 0, "above 0"),
        ("threads", threads, threads is None or 1 <= threads <= 1024, "1 to 1024"),
    ]
    if cache and cache.epochs is not None:
        unmixed = not (recipe.training.mixup or recipe.training.cutmix)
        why = "null with mixup or cutmix, whose images are mixed with others in each epoch"
        required += [
            ("mentor_cache.epochs", cache.epochs, cache.epochs >= 1, "at least 1"),
            ("mentor_cache.epochs", cache.epochs, unmixed, why),
        ]
    return required


def _of_data(data: DataConfig) -> list[Requirement]:
    size, padding, cutout = data.image_size, data.padding or 0, data.cutout
    side = f"to {LARGEST_SIDE} pixels"
    return [
        ("data.image_size", size, 1 <= size <= LARGEST_SIDE, f"1 {side}"),
        ("data.test_share", data.test_share, 0 < data.test_share < 1, "between 0 and 1"),
        ("data.validation", data.validation, 0 <= data.validation < 1, "from 0 to below 1"),
        ("data.padding", padding, 0 <= padding <= LARGEST_SIDE, f"0 {side}"),
        ("data.cutout", cutout, 0 <= cutout <= LARGEST_SIDE, f"0 {side}"),
        ("data.cutout", cutout, data.crop == "pad" or cutout == 0, "0 with crop: resize"),
        ("data.split_seed", data.split_seed, (data.split_seed or 0) >= 0, "at least 0"),
        *_of_channels("data", data.mean, data.std),
    ]


def _of_mentor(name: str, mentor: MentorConfig, epochs: int) -> list[Requirement]:
    """``epochs`` is the length of the mentor's schedule."""
    own, at = mentor.epochs, mentor.at
    return [
        (f"{name}.epochs", own, own is None or own >= 1, "at least 1"),
        (f"{name}.at", at, at is None or 1 <= at <= epochs, f"an epoch from 1 to {epochs}"),
        *_of_channels(name, mentor.mean, mentor.std),
        (f"{name}.weights", repr(""), mentor.weights != "", "a file"),
    ]


def _of_training(name: str, how: TrainingConfig) -> list[Requirement]:
    rate, clip = how.learning_rate, how.clip_norm
    in_order = how.milestones == sorted(how.milestones) and all(0 < m < 1 for m in how.milestones)
    is_warm = 0 <= how.warmup_epochs <= how.epochs
    has_momentum = how.momentum > 0 or not how.nesterov
    return [
        (f"{name}.epochs", how.epochs, how.epochs >= 1, "at least 1"),
        (f"{name}.batch_size", how.batch_size, how.batch_size >= 1, "at least 1"),
        (f"{name}.learning_rate", rate, rate is None or 0 < rate < math.inf, "a number above 0"),
        (f"{name}.milestones", how.milestones, in_order, "shares between 0 and 1 in order"),
        (f"{name}.warmup_epochs", how.warmup_epochs, is_warm, "from 0 to the epochs"),
        (f"{name}.momentum", how.momentum, 0 <= how.momentum < 1, "from 0 to below 1"),
        (f"{name}.nesterov", how.nesterov, has_momentum, "false without momentum"),
        (f"{name}.weight_decay", how.weight_decay, 0 <= how.weight_decay < math.inf, "≥ 0"),
        (f"{name}.clip_norm", clip, clip is None or 0 < clip < math.inf, "a number above 0"),
        (f"{name}.mixup", how.mixup, is_alpha(how.mixup), ALPHAS),
        (f"{name}.cutmix", how.cutmix, is_alpha(how.cutmix), ALPHAS),
    ]


def _of_channels(name: str, mean: list[float] | None, std: list[float] | None) -> list[Requirement]:
    positive = std is None or (len(std) == 3 and min(std) > 0)
    return [
        (f"{name}.mean", mean, mean is None or len(mean) == 3, "three numbers"),
        (f"{name}.std", std, positive, "three positive numbers"),
        (f"{name}.std", std, (mean is None) == (std is None), f"given with {name}.mean"),
    ]
