"""The ranges of a recipe's values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from classroomkd.errors import UserError
from classroomkd.limits import ALPHAS, is_alpha
from classroomkd.loss.methods import method_names
from classroomkd.loss.options import LossOptions
from classroomkd.models.network_names import is_checkpoint, is_logits

if TYPE_CHECKING:
    from classroomkd.runs.recipe import Recipe


def _normalisation(
    of: str, mean: list[float] | None, std: list[float] | None
) -> list[tuple[str, object, bool, str]]:
    """The checks of a mean and a standard deviation per channel."""
    positive = std is None or (len(std) == 3 and min(std) > 0)
    return [
        (f"{of}.mean", mean, mean is None or len(mean) == 3, "three numbers"),
        (f"{of}.std", std, positive, "three positive numbers"),
        (f"{of}.std", std, (mean is None) == (std is None), f"given with {of}.mean"),
    ]


def check(recipe: Recipe, where: str) -> None:
    """Raise UserError for a value outside its range."""
    data, threads = recipe.data, recipe.threads
    problems = [
        ("mentors", len(recipe.mentors), len(recipe.mentors) <= 16, "at most 16"),
        ("seed", recipe.seed, recipe.seed >= 0, "a whole number of at least 0"),
        ("data.image_size", data.image_size, 1 <= data.image_size <= 1024, "1 to 1024 pixels"),
        ("data.test_share", data.test_share, 0 < data.test_share < 1, "between 0 and 1"),
        ("data.validation", data.validation, 0 <= data.validation < 1, "from 0 to below 1"),
        ("data.padding", data.padding, 0 <= (data.padding or 0) <= 1024, "0 to 1024 pixels"),
        ("data.cutout", data.cutout, 0 <= data.cutout <= 1024, "0 to 1024 pixels"),
        ("data.cutout", data.cutout, data.crop == "pad" or data.cutout == 0, "0 with crop: resize"),
        *_normalisation("data", data.mean, data.std),
        ("init", repr(""), recipe.init != "", "a file"),
        ("mentor_seed", recipe.mentor_seed, (recipe.mentor_seed or 0) >= 0, "at least 0"),
        ("data_seed", recipe.data_seed, (recipe.data_seed or 0) >= 0, "at least 0"),
        ("data.split_seed", data.split_seed, (data.split_seed or 0) >= 0, "at least 0"),
        ("checkpoint_keep", recipe.checkpoint_keep, recipe.checkpoint_keep >= 1, "at least 1"),
        ("checkpoint_epochs", recipe.checkpoint_epochs, recipe.checkpoint_epochs >= 1, "≥ 1"),
        ("checkpoint_minutes", recipe.checkpoint_minutes, recipe.checkpoint_minutes > 0, "above 0"),
        ("threads", threads, threads is None or 1 <= threads <= 1024, "1 to 1024"),
    ]
    for index, mentor in enumerate(recipe.mentors):
        epochs = mentor.epochs or recipe.mentor_training.epochs
        fine = mentor.epochs is None or mentor.epochs >= 1
        problems.append((f"mentors.{index}.epochs", mentor.epochs, fine, "at least 1"))
        if is_logits(mentor.source):
            given = {key: of for key, of in vars(mentor).items() if key != "source"}
            if key := next((key for key, of in given.items() if of is not None), None):
                raise UserError(
                    f"{where}mentors.{index}.{key}: {mentor.source} holds logits, which have none"
                )
        fine = mentor.at is None or 1 <= mentor.at <= epochs
        problems.append((f"mentors.{index}.at", mentor.at, fine, f"an epoch from 1 to {epochs}"))
        if mentor.weights is not None and is_checkpoint(mentor.source):
            raise UserError(
                f"{where}mentors.{index}.weights: {mentor.source} is a checkpoint itself; give the "
                "network's name as source"
            )
        problems += _normalisation(f"mentors.{index}", mentor.mean, mentor.std)
        problems.append((f"mentors.{index}.weights", repr(""), mentor.weights != "", "a file"))
    for name in ("training", "mentor_training"):
        how = getattr(recipe, name)
        rate, alphas = how.learning_rate, (("mixup", how.mixup), ("cutmix", how.cutmix))
        clip = how.clip_norm
        in_order = all(0 < m < 1 for m in how.milestones) and how.milestones == sorted(
            how.milestones
        )
        is_warm = 0 <= how.warmup_epochs <= how.epochs
        fits = how.momentum > 0 or not how.nesterov
        problems += [
            (f"{name}.epochs", how.epochs, how.epochs >= 1, "at least 1"),
            (f"{name}.batch_size", how.batch_size, how.batch_size >= 1, "at least 1"),
            (
                f"{name}.learning_rate",
                rate,
                rate is None or 0 < rate < math.inf,
                "a number above 0",
            ),
            (f"{name}.milestones", how.milestones, in_order, "shares between 0 and 1 in order"),
            (f"{name}.warmup_epochs", how.warmup_epochs, is_warm, "from 0 to the epochs"),
            (f"{name}.momentum", how.momentum, 0 <= how.momentum < 1, "from 0 to below 1"),
            (f"{name}.nesterov", how.nesterov, fits, "false without momentum"),
            (f"{name}.weight_decay", how.weight_decay, 0 <= how.weight_decay < math.inf, "≥ 0"),
            (f"{name}.clip_norm", clip, clip is None or 0 < clip < math.inf, "a number above 0"),
            *((f"{name}.{key}", alpha, is_alpha(alpha), ALPHAS) for key, alpha in alphas),
        ]
    if recipe.mentor_cache and (repeat := recipe.mentor_cache.epochs) is not None:
        mixes = recipe.training.mixup or recipe.training.cutmix
        problems += [
            ("mentor_cache.epochs", repeat, repeat >= 1, "at least 1"),
            (
                "mentor_cache.epochs",
                repeat,
                not mixes,
                "null with mixup or cutmix, whose images are mixed with others in each epoch",
            ),
        ]
    for key, value, fine, wanted in problems:
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
