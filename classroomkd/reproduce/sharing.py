"""The work that the mentor cache saves in a plan of runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from classroomkd.data import NAMED_SOURCES, ImageFiles, ImageSet, Parts, cifar
from classroomkd.data.sources import list_parts, load_parts, split_mask
from classroomkd.loss.methods import method_names
from classroomkd.models.network_names import label
from classroomkd.reproduce.plan import Task, forward_flops
from classroomkd.runs.identity import mentor_values, values_without
from classroomkd.runs.recipe import Recipe, kept_epochs, mentor_seed, split_seed, teaching


def with_cached_mentors(runs: Sequence[Task]) -> list[Task]:
    """The same runs, without the work of mentors whose logits an earlier run caches."""
    kept: set[str] = set()
    result = []
    for run in runs:
        recipe, saved, new = run.recipe, 0.0, 0
        if recipe.mentor_cache and not method_names.entry(recipe.method).uses_features:
            keys = _keys(recipe)
            for mentor, key in zip(teaching(recipe), keys, strict=True):
                asked = 0 if key in kept else kept_epochs(recipe)
                new += asked
                flops = forward_flops(mentor.source, recipe.data.image_size)
                saved += flops * (recipe.training.epochs - asked)
            kept |= set(keys)
        result.append(replace(run, work=run.work - saved, saved=saved, kept=new))
    return result


def cache_bytes(runs: Sequence[Task]) -> int:
    """The size of what ``runs`` keep in the mentor cache. Their data is read or listed.

    Raises UserError as `load_parts` does.
    """
    from classroomkd.training.logits_files import size

    total = 0
    for run in runs:
        if run.kept:
            assert run.recipe.mentor_cache is not None
            data, seed = run.recipe.data, split_seed(run.recipe)
            counts = _counted(data.source, seed, data.test_share, data.validation)
            total += size((run.kept, *counts), run.recipe.mentor_cache.dtype)
    return total


@cache
def _counted(source: str, seed: int, test_share: float, validation: float) -> tuple[int, int]:
    """How many images a recipe with this data trains on, and of how many classes."""
    parts: Parts[ImageSet] | Parts[ImageFiles]
    if source in NAMED_SOURCES:
        parts = Parts(*NAMED_SOURCES[source].read(seed, test_share))
    elif cifar.find(Path(source)):
        parts = load_parts(source)
    else:
        parts = list_parts(source, seed, test_share)
    count = len(parts.train)
    if validation and parts.validation is None:
        count -= int(split_mask(parts.train, validation, seed).sum())
    return count, len(parts.train.classes)


def _keys(recipe: Recipe) -> list[str]:
    """The values that identify the logits of a recipe's mentors, as far as a plan can know."""
    seed = recipe.data_seed
    training, cache = recipe.training, recipe.mentor_cache
    assert cache is not None
    common = [
        mentor_seed(recipe),
        recipe.mentor_training.deciding(),
        values_without(recipe.data, "machine"),
        list(mentor_values(recipe).values()),
        [recipe.seed, label(recipe.student)] if seed is None else seed,
        [training.batch_size, training.mixup, training.cutmix, kept_epochs(recipe), cache.dtype],
    ]
    keys, count = [], Counter[str]()
    for mentor in teaching(recipe):
        own = json.dumps(asdict(mentor), sort_keys=True)
        count[own] += 1  # mentors of the same network are trained separately
        keys.append(json.dumps([own, count[own], *common], sort_keys=True))
    return keys
