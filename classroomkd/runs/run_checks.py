"""The checks of a run's networks before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from classroomkd.errors import UserError
from classroomkd.loss.methods import Method
from classroomkd.models import NetworkInfo
from classroomkd.models.initial_weights import load_given
from classroomkd.models.network_names import is_code
from classroomkd.models.stages import feature_shapes
from classroomkd.runs.builder import Builder, check_trainable, outputs_of
from classroomkd.runs.mentor_setup import Mentor
from classroomkd.runs.recipe import Recipe
from classroomkd.training.config import TrainingConfig
from classroomkd.training.distributed import Processes


@dataclass
class RunChecks:
    """The checks of a run: those that need no data, and those that do."""

    recipe: Recipe
    mentors: Sequence[Mentor]
    builder: Builder
    processes: Processes

    def before_data(self, method: Method | None) -> None:
        """Raise UserError for impossible networks, weights, mixing or features.

        ``method`` trains the student; None if there is no student.
        """
        for name, training in self._trained():
            self._check_trainable(name, training)
        first = [(self.recipe.student, self.recipe.init)]
        first += [(mentor.architecture, mentor.job.weights) for mentor in self.mentors]
        for name, weights in dict.fromkeys(first):
            if weights is not None:
                load_given(name, weights, lambda _: None)
        if method is not None:
            self._check_labels(method)
            if method.uses_features:
                self._check_features(method)

    def with_data(self, info: NetworkInfo, example: Tensor) -> None:
        """Raise UserError for a network whose number of outputs is not the number of classes.

        ``info`` describes any network of the run, and ``example`` are images of the data.
        """
        classes, student = len(info.classes), self.recipe.student
        for name, training in self._trained():
            if is_code(name):
                self._check_trainable(name, training, classes)
        if student in self.builder.modules:
            network = copy.deepcopy(self.builder.modules[student]).cpu().eval()
            with torch.no_grad():
                outputs = outputs_of(network, example, f"the student {student}")
            if outputs != classes:
                raise UserError(
                    f"the student {student} has {outputs} outputs for {classes} classes"
                )

    def _trained(self) -> list[tuple[str, TrainingConfig]]:
        """The architectures that are trained, each once, with its training."""
        recipe = self.recipe
        mentors = [mentor.architecture for mentor in self.mentors if mentor.network is None]
        trained = [(recipe.student, recipe.training)] if recipe.student else []
        trained += [(name, recipe.mentor_training) for name in dict.fromkeys(mentors)]
        return [(name, how) for name, how in trained if name not in self.builder.modules]

    def _check_trainable(
        self, name: str, training: TrainingConfig, num_classes: int | None = None
    ) -> None:
        share = self.processes.share(training.batch_size)
        check_trainable(name, self.recipe.data.image_size, share, num_classes)

    def _check_labels(self, method: Method) -> None:
        """Raise UserError if the training mixes images for a method that takes no mixed labels."""
        recipe = self.recipe
        for name in ("mixup", "cutmix"):
            if (alpha := getattr(recipe.training, name)) and not method.soft_labels:
                raise UserError(
                    f"method {recipe.method} needs one class per image, which training.{name}="
                    f"{alpha} rules out: set it to 0 or use another method"
                )

    def _check_features(self, method: Method) -> None:
        """Raise UserError if the features that the method asks for are not available."""
        size, student = self.recipe.data.image_size, self.recipe.student
        names = [student, *(mentor.architecture for mentor in self.mentors)]
        if any(name in self.builder.modules for name in names):
            return  # the trainer tries them with the images
        own = feature_shapes(student, size, method.student_layers)
        theirs = [feature_shapes(name, size, method.teacher_layers) for name in names[1:]]
        method.prepare(own, theirs)
