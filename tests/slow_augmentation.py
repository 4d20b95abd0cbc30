"""The augmentations written row by row and pixel by pixel, in plain Python."""

import itertools

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.stats import beta

from classroomkd.data.augmentation import AUGMENT, CUTOUT, words

SEEDS = st.integers(0, 2**64 - 1)


def slow_hash(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x = x * factor % 2**32
    return x ^ x >> 16


def slow_word(stream, seed, epoch, index):
    key = stream
    for part in (seed % 2**32, seed // 2**32, epoch):
        key = slow_hash(((key ^ part) + 0x9E3779B9) % 2**32)
    return slow_hash(slow_hash(index) ^ key)


def slow_augment(image, padding, flip, seed, epoch, index):
    """One image, pixel by pixel."""
    h, offsets = slow_word(AUGMENT, seed, epoch, index), 2 * padding + 1
    top = (h // 2**17) * offsets // 2**15
    left = (h // 4 % 2**15) * offsets // 2**15
    height, width, _ = image.shape
    result = np.zeros_like(image)
    for y, x in itertools.product(range(height), range(width)):
        from_x = width - 1 - x if flip and h % 2 else x
        row, column = y + top - padding, from_x + left - padding
        if 0 <= row < height and 0 <= column < width:
            result[y, x] = image[row, column]
    return result


def slow_cutout(shape, size, seed, epoch, index):
    """A mask [H, W] of the pixels that cutout erases."""
    h, (height, width) = slow_word(CUTOUT, seed, epoch, index), shape[:2]
    top = (h // 2**17) * height // 2**15 - size // 2
    left = (h // 4 % 2**15) * width // 2**15 - size // 2
    mask = np.zeros((height, width), bool)
    for y, x in itertools.product(range(height), range(width)):
        mask[y, x] = 0 <= y - top < size and 0 <= x - left < size
    return mask


def slow_draw(mixing, seed, epoch, index, height, width):
    """The share of the own pixels, the rows and columns of the box, the own class's share."""
    h, g = (int(words(stream, seed, epoch, np.array([index]))[0]) for stream in (24, 25))
    cuts = mixing.cutmix > 0 if not (mixing.mixup and mixing.cutmix) else h % 2 == 1
    alpha = mixing.cutmix if cuts else mixing.mixup
    share = round(beta.ppf(((h >> 16) + 0.5) / 65536, alpha, alpha) * 2**24) / 2**24
    if not cuts:
        return share, range(0), range(0), share
    sides = []
    for length, at in ((height, g >> 16), (width, g & 0xFFFF)):
        part = round(length * (1 - share) ** 0.5)
        first = (at * length >> 16) - part // 2
        sides.append(range(max(first, 0), min(first + part, length)))
    outside = height * width - len(sides[0]) * len(sides[1])
    return 1.0, *sides, round(outside / (height * width) * 2**24) / 2**24


def slow_mix(mixing, images, targets, seed, epoch, indices):
    """Row by row and pixel by pixel, in NumPy's float32."""
    images, one = images.float().numpy(), np.float32(1)
    mixed, labels = images.copy(), np.zeros((len(images), mixing.num_classes), np.float32)
    for b, index in enumerate(indices):
        other = (b + 1) % len(images)
        *_, height, width = images.shape
        share, rows, columns, own = slow_draw(mixing, seed, epoch, index, height, width)
        for y in range(height):
            for x in range(width):
                w = np.float32(0 if y in rows and x in columns else share)
                mixed[b, :, y, x] = images[b, :, y, x] * w + images[other, :, y, x] * (one - w)
        labels[b, targets[b]] += np.float32(own)
        labels[b, targets[other]] += one - np.float32(own)
    return torch.from_numpy(mixed), torch.from_numpy(labels)
