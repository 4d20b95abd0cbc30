"""What is stored with a network's weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NetworkInfo:
    """What a network's weights do not contain.

    ``mean`` and ``std`` are per RGB channel, of pixel values scaled to 0..1. Images are
    ``image_size`` pixels high and wide. ``classes`` are in the order of the logits.
    ``architecture`` is a name that `create` knows; for a user's own network ``code`` is the SHA-256
    of its file, which `save_network` fills in.
    """

    architecture: str
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    code: str | None = None
