"""Synthetic images for data sets with any number of classes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

_OVERSAMPLING = 4


def drawn(n_classes: int, per_class: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [n_classes · per_class, size, size, 3], and their classes, int64.

    A class is three strokes (lines or discs), each with a position and a colour. Each image shows
    them randomly rotated, scaled, shifted and tinted, on a random background with noise. The number
    of classes is the seed, so sets with different numbers of classes share no strokes.
    """
    rng = np.random.default_rng(n_classes)
    side = _OVERSAMPLING * size
    classes = [
        [
            (rng.uniform(0.15, 0.85, (2, 2)), rng.uniform(60, 255, 3), rng.integers(2), width)
            for width in rng.uniform(0.05, 0.12, 3)
        ]
        for _ in range(n_classes)
    ]
    targets = np.tile(np.arange(n_classes), per_class)
    images = np.empty((len(targets), size, size, 3), np.uint8)
    for number, target in enumerate(targets):
        ground = tuple(rng.integers(0, 120, 3).tolist())
        picture = Image.new("RGB", (side, side), ground)
        draw = ImageDraw.Draw(picture)
        angle, scale = rng.normal(0, 0.25), np.exp(rng.normal(0, 0.15))
        shift = rng.normal(0, 0.08, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
        for ends, colour, is_line, width in classes[target]:
            moved = ends + rng.normal(0, 0.04, (2, 2)) - 0.5
            begin, end = ((moved @ turn.T + 0.5 + shift) * side).tolist()
            fill = tuple(np.clip(colour + rng.normal(0, 40, 3), 0, 255).astype(int).tolist())
            if is_line:
                draw.line([*begin, *end], fill=fill, width=max(1, int(width * side)))
            else:
                radius = 1.5 * width * side
                x, y = begin
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
        small = np.asarray(picture.resize((size, size), Image.Resampling.BOX), np.float32)
        images[number] = np.clip(small + rng.normal(0, 25, small.shape), 0, 255)
    return images, targets
