"""Pictures of samples in rows, with a name on the left if there are classes: PNG and GIF."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.diffusion.objective import sampler_sigmas

# Pixels: of the images of a row or column together at most, of an image at least, between images.
WIDEST, SMALLEST, GAP = 2_048, 48, 2
_TEXT, _LINE = 12, 16
# Frames at most, before the last one, which shows the finished images.
FRAMES = 48
# Milliseconds of all frames but the last, of a frame at least, and of the last one.
RUN_MS, FRAME_MS, LAST_MS = 4_000, 40, 2_000
LONGEST = "NFE 000 of 000, noise level 00.00"
# Pixels of the images of a row or column of the animation together, at most.
WIDEST_ANIMATION = 1_024


def draw_grid(
    rows: Sequence[Sequence[np.ndarray]], names: Sequence[str] | None, title: str, url: str
) -> None:
    """Write a PNG of rows of images (R, R, 3) uint8.

    Args:
        names: of the rows; None for none.
        title: lines above the images.
    """
    side = cell_side(len(rows[0][0]), max(len(rows), *(len(row) for row in rows)), WIDEST)
    cells = [[resized(image, side) for image in row] for row in rows]
    with storage.atomic_file(url) as path:
        page(cells, names, title).save(path, format="PNG")


def in_rows(images: Iterable[np.ndarray], counts: Sequence[int]) -> list[list[np.ndarray]]:
    """Images row by row, each with its number of images."""
    left = iter(images)
    return [list(itertools.islice(left, count)) for count in counts]


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


class Animation:
    """The denoising as a GIF: the model's predictions of x_0 along the trajectory, in a grid.

    It collects frames while images are generated.

    Args:
        recipe: of the images.
        rows: number of images of each row, top to bottom.
        names: of the rows; None for none.
    """

    def __init__(self, recipe: Recipe, rows: Sequence[int], names: Sequence[str] | None) -> None:
        self.levels = sampler_sigmas(recipe.diffusion, recipe.evaluate.sampler)
        count = min(FRAMES, len(self.levels))
        self._calls = np.linspace(0, len(self.levels) - 1, count).round().astype(int).tolist()
        self.rows, self.names = rows, names
        self.side = cell_side(recipe.data.resolution, max(*rows, len(rows)), WIDEST_ANIMATION)
        self._cells: list[list[np.ndarray]] = [[] for _ in range(count + 1)]

    def watcher(self, decode: Callable[[Tensor], np.ndarray]) -> Callable[[Tensor], None]:
        """What is given a batch's predictions of x_0, (B, C, h, w), at each call of the denoiser.

        Args:
            decode: latents to images (B, R, R, 3) uint8; of the shown ones only.
        """
        call = -1

        def watch(x0: Tensor) -> None:
            nonlocal call
            call += 1
            if call in self._calls:
                self._add(self._calls.index(call), decode(x0))

        return watch

    def finish(self, images: np.ndarray) -> None:
        """Take the finished images (B, R, R, 3) uint8 of the batch just watched."""
        self._add(-1, images)

    def _add(self, frame: int, images: np.ndarray) -> None:
        self._cells[frame] += [resized(image, self.side) for image in images]

    def write(self, url: str) -> None:
        """Write the GIF; it repeats without end."""
        total = len(self.levels)
        frames = [
            self._frame(cells, f"NFE {call + 1} of {total}, noise level {self.levels[call]:.2f}")
            for call, cells in zip(self._calls, self._cells, strict=False)
        ]
        frames.append(self._frame(self._cells[-1], f"NFE {total} of {total}, finished"))
        pause = max(FRAME_MS, RUN_MS // (len(frames) - 1))
        with storage.atomic_file(url) as path:
            frames[0].save(
                path,
                format="GIF",
                save_all=True,
                append_images=frames[1:],
                duration=[pause] * (len(frames) - 1) + [LAST_MS],
                loop=0,
            )

    def _frame(self, cells: Sequence[np.ndarray], caption: str) -> Image.Image:
        return page(in_rows(cells, self.rows), self.names, caption, LONGEST).quantize(256)
