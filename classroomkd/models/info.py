"""What is recorded about a network beside its weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NetworkInfo:
    """What a network's weights do not tell.

    ``mean`` and ``std`` are of pixel values scaled to 0..1, one for each RGB channel; images are
    ``image_size`` pixels high and wide; ``classes`` are in the order of the logits.
    ``architecture`` is a name that `create` knows; of one of one's own ``code`` is the SHA-256 of
    its file, which `save_network` fills in.
    """

    architecture: str
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    code: str | None = None
