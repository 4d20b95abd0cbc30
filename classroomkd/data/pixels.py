"""Augmentation on the CPU: one pass from stored bytes to finished values, compiled by numba.

An image's bytes are read once and its values written once. The compiled function releases the GIL,
so that threads can share a batch, and is cached on disk if numba finds a writable folder.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from classroomkd.compiled import compiled
from classroomkd.data.augmentation import Augmentation

# Values are copied from the table as bits, for any dtype.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def augment_batch(
    pixels: np.ndarray,
    starts: np.ndarray,
    indices: np.ndarray,
    augmentation: Augmentation | None,
    seed: int,
    epoch: int,
    table: Tensor,
    out: Tensor,
    pool: ThreadPoolExecutor | None = None,
    threads: int = 1,
) -> None:
    """Augment and normalise a batch of images.

    Args:
        pixels: the images, uint8 [bytes], H·W·3 contiguous bytes each.
        starts: int64 [B], the offset of each image in ``pixels``; not checked.
        indices: int64 [B], the samples' indices in the set, which determine crop and flip.
        augmentation: None for none.
        seed: of the hash.
        epoch: of the hash.
        table: the normalised values [3, 256] of any floating dtype, on the CPU.
        out: [B, H, W, 3] of that dtype, contiguous; written to.
        pool: if given, the batch is divided among ``threads`` of its threads.
        threads: see ``pool``.
    """
    B, H, W, _ = out.shape
    nothing = np.zeros(B, np.int64)
    top, left, flip = row, column, _ = nothing, nothing, nothing
    padding = cutout = 0
    if augmentation is not None:
        padding, cutout = augmentation.padding, augmentation.cutout
        top, left, flip = augmentation.draw(seed, epoch, indices)
        if cutout:
            row, column = augmentation.draw_cutout(seed, epoch, indices, H, W)
    places = np.stack((starts, top - padding, left - padding, flip, row, column), axis=1)
    bits = _BITS[table.element_size()]
    entries, values = table.view(bits).view(-1).numpy(), out.view(bits).view(B, H, -1).numpy()
    if pool is None or threads == 1:
        _augment(pixels, places, cutout, entries, values)
        return
    cuts = np.linspace(0, B, threads + 1).astype(int)
    parts = [
        pool.submit(_augment, pixels, places[a:b], cutout, entries, values[a:b])
        for a, b in pairwise(cuts)
    ]
    for part in parts:
        part.result()


@compiled()
def _augment(pixels, places, cutout, table, out):
    """Fill out [B, H, 3·W] from ``pixels``.

    ``places`` [B, 6] is, for each image, the offset of its first byte, the first row and column of
    its window (negative in the border), flip, and the first row and column of its cutout.
    """
    B, H, entries = out.shape
    W = entries // 3
    for b in range(B):
        start, top, left, flip, cut_row, cut_column = places[b]
        # Columns of the window, before the flip, that are inside the image: first ≤ x < last.
        first, last = max(0, -left), min(W, W - left)
        for y in range(H):
            row = out[b, y]
            inside = 0 <= y + top < H and first < last
            if not inside or first > 0 or last < W:
                for x in range(W):
                    row[3 * x] = table[0]
                    row[3 * x + 1] = table[256]
                    row[3 * x + 2] = table[512]
            if inside:
                # Unsigned, because numba checks signed indices for negative values.
                at = np.uint64(start + 3 * ((y + top) * W + left + first))
                to = np.uint64(3 * (W - 1 - first if flip else first))
                for _ in range(last - first):
                    row[to] = table[np.uint64(pixels[at])]
                    row[to + np.uint64(1)] = table[
                        np.uint64(256) + np.uint64(pixels[at + np.uint64(1)])
                    ]
                    row[to + np.uint64(2)] = table[
                        np.uint64(512) + np.uint64(pixels[at + np.uint64(2)])
                    ]
                    at += np.uint64(3)
                    to = to - np.uint64(3) if flip else to + np.uint64(3)
            if cutout and cut_row <= y < cut_row + cutout:
                row[3 * max(0, cut_column) : 3 * max(0, min(W, cut_column + cutout))] = 0
