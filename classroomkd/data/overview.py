"""The contact sheet and image sizes that `classroomkd data info` shows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from classroomkd.data.decoding import read_size, square
from classroomkd.data.ffcv.beton import open_beton
from classroomkd.data.image_sets import ImageFiles, ImageSet

LISTED = 20  # classes listed with their counts, and shown on a contact sheet
_COLUMNS = 10  # images per class on a contact sheet
_TILE = 48  # smallest longer side of an image on a contact sheet, in pixels


def contact_sheet(image_set: ImageSet) -> Image.Image:
    """The first images of the first classes, one row per class, labelled with its name."""
    font, gap = ImageFont.load_default(), 2
    # Pillow's default font raises for letters outside Latin-1.
    names = [
        name.encode("latin-1", "replace").decode("latin-1") for name in image_set.classes[:LISTED]
    ]
    height, width = image_set.images.shape[1:3]
    scale = max(1, -(-_TILE // max(height, width)))
    row, column = height * scale + gap, width * scale + gap
    left = 2 * gap + max(int(font.getlength(name)) + 1 for name in names)
    sheet = Image.new("RGB", (left + _COLUMNS * column, gap + len(names) * row), "white")
    draw = ImageDraw.Draw(sheet)
    for k, name in enumerate(names):
        top = gap + k * row
        draw.text((gap, top + height * scale // 2 - 6), name, "black", font)
        for j, i in enumerate(np.flatnonzero(image_set.targets == k)[:_COLUMNS]):
            image = image_set.images[i].repeat(scale, 0).repeat(scale, 1)
            sheet.paste(Image.fromarray(image), (left + j * column, top))
    return sheet


def load_beton(path: Path, size: int | None, common_size: int) -> tuple[ImageSet, np.ndarray]:
    """The images of a file in memory, as squares if their sizes differ, and these sizes [N, 2]."""
    beton = open_beton(path)
    sizes = np.stack((beton.heights, beton.widths), axis=1)
    if size is None and (sizes != sizes[0]).any():
        size = common_size
    images = np.empty((len(beton), *(sizes[0] if size is None else (size, size)), 3), np.uint8)
    for i in range(len(beton)):
        images[i] = beton[i][0] if size is None else square(beton[i][0], size)
    return ImageSet(images, beton.targets, beton.classes), sizes


def sizes_of(images: ImageFiles) -> np.ndarray:
    """Height and width of every image file, [N, 2]."""
    with ThreadPoolExecutor() as pool:
        return np.array(list(pool.map(read_size, images.files, chunksize=64)))
