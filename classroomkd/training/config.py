"""How one network is trained: a recipe's values under training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass
class TrainingConfig:
    """How a network is trained: by stochastic gradient descent on a schedule (see ``schedule``)."""

    epochs: int = 240
    """Mentors are trained for as many as the student, where only its own are given."""
    batch_size: int = 64
    """Images a step, over all processes together."""
    learning_rate: float | None = 0.05
    """The schedule's peak; null is 0.01 with depthwise convolutions and 0.05 without."""
    schedule: Literal["classroom", "steps", "cosine"] = "classroom"
    """How the rate falls: "steps" at the milestones only, "classroom" also linearly to a fifth over
    the first half, "cosine" as half a cosine to 0."""
    milestones: list[float] = field(default_factory=lambda: [5 / 8, 6 / 8, 7 / 8])
    """Shares of the training after which "classroom" and "steps" divide the rate by ten."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises from 0."""
    momentum: float = 0.9
    """The momentum of stochastic gradient descent."""
    nesterov: bool = False
    """Whether to use Nesterov's momentum."""
    weight_decay: float = 5e-4
    """This times each weight is added to the weight's gradient."""
    decay_norms_and_biases: bool = True
    """Whether batch norms and biases decay too."""
    clip_norm: float | None = None
    """The largest norm that the gradient of all parameters together may have; a larger one is
    scaled down to it. Null: never."""
    mixup: float = 0.0
    """The α of MixUp's Beta(α, α), from 0.001 to 1000, or 0: off. With CutMix too, each image takes
    one of the two."""
    cutmix: float = 0.0
    """The α of CutMix's Beta(α, α), from 0.001 to 1000, or 0: off."""

    def deciding(self) -> dict[str, Any]:
        """All that a training depends on, by name; mixing and clipping only if they are on.

        So mentors that were stored before these options existed are still found.
        """
        off = {name for name in ("mixup", "cutmix", "clip_norm") if not getattr(self, name)}
        return {name: value for name, value in asdict(self).items() if name not in off}
