"""The denoising as a GIF: the model's predictions of x_0 along the trajectory, in a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.diffusion.objective import sampler_sigmas
from diffit_train.evaluation.grid import cell_side, page, resized

# Frames at most, before the last one, which shows the finished images.
FRAMES = 48
# Milliseconds of all frames but the last, of a frame at least, and of the last one.
RUN_MS, FRAME_MS, LAST_MS = 4_000, 40, 2_000
LONGEST = "NFE 000 of 000, noise level 00.00"
# Pixels of the images of a row or column together, at most.
WIDEST = 1_024


class Animation:
    """Collects frames while images are generated, then writes the GIF.

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
        self.side = cell_side(recipe.data.resolution, max(*rows, len(rows)), WIDEST)
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
        images, rows = iter(cells), []
        for count in self.rows:
            rows.append([next(images) for _ in range(count)])
        return page(rows, self.names, caption, LONGEST).quantize(256)
