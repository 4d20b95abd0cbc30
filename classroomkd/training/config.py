"""The values of a recipe's ``training`` and ``mentor_training``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass
class TrainingConfig:
    """How to train a network by stochastic gradient descent (see ``schedule``)."""

    epochs: int = 240
    """Training epochs; if only the student's are given, mentors are trained for as many."""
    batch_size: int = 64
    """Images per step, over all processes."""
    learning_rate: float | None = 0.05
    """The peak of the schedule; null is 0.01 with depthwise convolutions and 0.05 without."""
    schedule: Literal["classroom", "steps", "cosine"] = "classroom"
    """How the learning rate falls: "steps" at the milestones, "classroom" also linearly to a fifth
    over the first half, "cosine" as half a cosine to 0."""
    milestones: list[float] = field(default_factory=lambda: [5 / 8, 6 / 8, 7 / 8])
    """Fractions of the training after which "classroom" and "steps" divide the rate by ten."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from 0."""
    momentum: float = 0.9
    """The momentum of stochastic gradient descent."""
    nesterov: bool = False
    """Whether to use Nesterov momentum."""
    weight_decay: float = 5e-4
    """Weight decay: this times each weight is added to its gradient."""
    decay_norms_and_biases: bool = True
    """Whether weight decay applies to batch norms and biases too."""
    clip_norm: float | None = None
    """Clip the gradient of all parameters to this norm; null disables clipping."""
    mixup: float = 0.0
    """The α of MixUp's Beta(α, α), from 0.001 to 1000; 0 turns it off. If CutMix is on too, each
    image gets one of the two."""
    cutmix: float = 0.0
    """The α of CutMix's Beta(α, α), from 0.001 to 1000; 0 turns it off."""

    def deciding(self) -> dict[str, Any]:
        """All values that a training depends on, by name; mixing and clipping only if they are on.

        So mentors stored before these options existed are still found.
        """
        off = {name for name in ("mixup", "cutmix", "clip_norm") if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in off}
