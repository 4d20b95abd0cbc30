"""What the parts of an open run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from classroomkd.data import Loaders
from classroomkd.data.batches import BatchLoaders
from classroomkd.models import NetworkInfo
from classroomkd.runs.builder import Builder
from classroomkd.runs.images import ImageSets, training_augmentation
from classroomkd.runs.interrupts import Interrupts
from classroomkd.runs.machine import versions
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

    def computation(self) -> dict[str, Any]:
        """What the bits of any network's logits depend on besides it, its images and its seed."""
        data, device = self.recipe.data, self.processes.device
        return {
            "image_size": data.image_size,
            "augmentation": repr(training_augmentation(data)),
            # Each loader resizes photographs in its own way.
            "loader": self.loaders.backend if data.crop == "resize" else None,
            "precision": str(self.dtype),
            "processes": self.processes.world_size,
            "device": device.type,
            "threads": self.recipe.threads if device.type == "cpu" else None,
            "versions": versions(),
        }
