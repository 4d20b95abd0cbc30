"""What the parts of an open run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from classroomkd.data import Loaders
from classroomkd.data.batches import BatchLoaders
from classroomkd.models import NetworkInfo
from classroomkd.runs.builder import Builder
from classroomkd.runs.images import ImageSets
from classroomkd.runs.interrupts import Interrupts
from classroomkd.runs.recipe import Recipe
from classroomkd.training.distributed import Processes


@dataclass(kw_only=True)
class RunContext:
    """A recipe with its images, and how its networks are computed: fields of the classes for it.

    ``info`` describes any network of the run, ``digests`` identify the parts of its images, and
    ``notify`` prints lines for the user.
    """

    recipe: Recipe
    info: NetworkInfo
    builder: Builder
    sets: ImageSets
    digests: Mapping[str, str]
    loaders: Loaders | BatchLoaders
    dtype: torch.dtype
    processes: Processes
    interrupts: Interrupts
    notify: Callable[[str], None]
