"""Pictures of samples: one row per class, with its name on the left, if there are classes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffit_train import storage

# Pixels: of the images of a row or column together at most, of an image at least, between images.
WIDEST, SMALLEST, GAP = 2_048, 48, 2
_TEXT, _LINE = 12, 16


def draw_grid(
    images: dict[int, list[np.ndarray]], classes: list[str] | None, title: str, url: str
) -> None:
    """Write a PNG with one row per label, or of images without labels in rows.

    Args:
        images: label, an index into `classes` or number of a row, to images (R, R, 3) uint8.
        title: lines above the images.
        url: file to write.
    """
    labels = sorted(images)
    rows = [images[label] for label in labels]
    side = cell_side(len(rows[0][0]), max(len(rows), *(len(row) for row in rows)), WIDEST)
    cells = [[resized(image, side) for image in row] for row in rows]
    names = None if classes is None else [classes[label] for label in labels]
    with storage.atomic_file(url) as path:
        page(cells, names, title).save(path, format="PNG")


def page(
    rows: Sequence[Sequence[np.ndarray]], names: Sequence[str] | None, title: str, longest: str = ""
) -> Image.Image:
    """Rows of images (S, S, 3) uint8, all of one size, with their names and a title above them.

    Args:
        longest: the longest title, where several pages are to have one size.
    """
    font = _font()
    lines = title.splitlines()
    left = GAP
    if names is not None:
        left += 3 * GAP + round(max(font.getlength(name) for name in names))
    top, step = GAP + _LINE * len(lines), len(rows[0][0]) + GAP
    text_width = round(max(font.getlength(line) for line in (*lines, longest))) + 2 * GAP
    width = max(left + step * max(len(row) for row in rows), text_width)
    made = Image.new("RGB", (width, top + step * len(rows)), "white")
    draw = ImageDraw.Draw(made)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP // 2 + number * _LINE), line, fill="black", font=font)
    for number, row in enumerate(rows):
        above = top + number * step
        if names is not None:
            middle = (left - 3 * GAP, above + step // 2)
            draw.text(middle, names[number], fill="black", font=font, anchor="rm")
        for column, image in enumerate(row):
            made.paste(Image.fromarray(image), (left + column * step, above))
    return made


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    # Pillow's own font has ASCII alone; matplotlib's has Latin, Greek and Cyrillic letters.
    package = importlib.util.find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), _TEXT)


def cell_side(resolution: int, most: int, widest: int) -> int:
    """Side of an image among others: small ones are enlarged by a whole number.

    Args:
        most: images of the longest row or column.
        widest: pixels of these together at most, but for images that would be too small to see.
    """
    each = max(SMALLEST // 3, widest // most)
    if resolution > each:
        return each
    return resolution * max(1, min(-(-SMALLEST // resolution), each // resolution))


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """An image (R, R, 3) uint8 at another size."""
    if len(image) == side:
        return image
    how = Image.Resampling.NEAREST if side > len(image) else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((side, side), how))
