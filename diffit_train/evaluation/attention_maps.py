"""A token's attention over the sampling trajectory, as a strip of maps (paper, figure 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffit_train import storage
from diffit_train.config.model import LatentModel
from diffit_train.errors import UserError
from diffit_train.evaluation.generate import Generator
from diffit_train.models.attention import TMSA, SelfAttention, TimeInBias
from diffit_train.models.attention_kernels import position_bias
from diffit_train.models.backbone import Backbone

# Maps in a strip.
COLUMNS = 8


@dataclass(frozen=True)
class Trajectory:
    """What one image's token attended to while the image was generated.

    Attributes:
        title: what generated it.
        image: the result, (R, R, 3) uint8.
        token: row and column.
        levels: noise level in [0, 1] of each map, from noise to image.
        maps: (steps, side, side), each sums to 1; zero outside the token's window.
    """

    title: str
    image: np.ndarray
    token: tuple[int, int]
    levels: list[float]
    maps: np.ndarray


def attention_of(model: Backbone, block: int | None) -> TMSA | SelfAttention:
    """The attention of a block; by default the last one on the finest grid of tokens.

    Raises:
        UserError: there is no such block, or its attention cannot be drawn.
    """
    layers = [[m for m in b.modules() if isinstance(m, TMSA | SelfAttention)] for b in model.blocks]
    if block is None:
        finest = max(m.side if isinstance(m, TMSA) else 0 for found in layers for m in found)
        block = max(
            i
            for i, found in enumerate(layers)
            if any(not isinstance(m, TMSA) or m.side == finest for m in found)
        )
    if not 0 <= block < len(layers) or not layers[block]:
        usable = [str(i) for i, found in enumerate(layers) if found]
        raise UserError(
            f"--block is {block}, but the blocks with attention are {', '.join(usable)}"
        )
    (layer,) = layers[block]
    if isinstance(layer, TimeInBias):
        raise UserError(
            "model.time is 'bias', whose attention depends on the image and is not drawn"
        )
    return layer


def token_weights(
    layer: TMSA | SelfAttention, token: tuple[int, int], q: Tensor, k: Tensor, bias: Tensor | None
) -> np.ndarray:
    """Attention weights of a token of the first image, averaged over heads: (side, side).

    Args:
        q, k: (images * windows, H, N, K).
        bias: (H, N, N), or None.
    """
    count = q.shape[2]
    window = math.isqrt(count)
    side = layer.side if isinstance(layer, TMSA) else window
    (row, column), many = token, side // window
    number = row // window * many + column // window
    place = row % window * window + column % window
    query, keys = q[number, :, place].float(), k[number].float()
    logits = torch.einsum("hk,hnk->hn", query, keys) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias[:, place].float()
    weights = logits.softmax(-1).mean(0).view(window, window)
    out = np.zeros((side, side))
    top, left = row // window * window, column // window * window
    out[top : top + window, left : left + window] = weights.cpu().numpy()
    return out


@contextmanager
def recorded(layer: TMSA | SelfAttention, token: tuple[int, int]) -> Iterator[list[np.ndarray]]:
    """Record `token_weights` at every call of a layer, whose results do not change."""
    maps: list[np.ndarray] = []
    kernel = layer.kernel

    def recording(
        q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
    ) -> Tensor:
        bias = None if table is None or index is None else position_bias(table, index)
        maps.append(token_weights(layer, token, q, k, bias))
        return kernel(q, k, v, table, index)

    layer.kernel = recording
    try:
        yield maps
    finally:
        layer.kernel = kernel


def trajectory(
    generator: Generator,
    label: int,
    seed: int,
    token: tuple[int, int],
    block: int | None,
    title: str,
) -> Trajectory:
    """Generate an image and record its token's attention.

    Raises:
        UserError: the token is outside the grid.
    """
    model = generator.model
    assert isinstance(model, Backbone)
    layer = attention_of(model, block)
    if isinstance(layer, TMSA):
        side = layer.side
    else:
        section = generator.recipe.model
        assert isinstance(section, LatentModel)
        side = generator.recipe.latent_size // section.patch_size
    if not (0 <= token[0] < side and 0 <= token[1] < side):
        raise UserError(
            f"--token is {token[0]},{token[1]}, but rows and columns go from 0 to {side - 1}"
        )
    levels: list[float] = []
    weight = generator.weight

    def noting(t: float) -> float:
        # Called once for each evaluation.
        levels.append(float(generator.objective.level(float(t))))
        return weight(t)

    generator.weight = noting
    try:
        with recorded(layer, token) as maps:
            (image,) = generator.images([(label, seed)], 1)
    finally:
        generator.weight = weight
    chosen = np.unique(np.linspace(0, len(maps) - 1, min(COLUMNS, len(maps))).round().astype(int))
    return Trajectory(
        title,
        image,
        token,
        [levels[i] for i in chosen],
        np.stack([maps[i] for i in chosen]),
    )


def attended_window(maps: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns outside of which no map (steps, side, side) has any weight."""
    rows, columns = np.nonzero(maps.sum(0))
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


def draw_trajectories(rows: list[Trajectory], url: str) -> None:
    """Write a PNG: the image of each row with token and window marked, then the window's maps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = 1 + max(len(row.maps) for row in rows)
    figure = Figure(figsize=(1.3 * columns, 1.75 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for cells, row in zip(axes, rows, strict=True):
        for cell in cells:
            cell.set_axis_off()
        scale = row.image.shape[0] / row.maps.shape[-1]
        window = attended_window(row.maps)
        top, left = (part.start for part in window)
        height, width = (part.stop - part.start for part in window)
        cells[0].imshow(row.image, interpolation="nearest")
        for y, x, h, w in ((top, left, height, width), (*row.token, 1, 1)):
            corner = (x * scale - 0.5, y * scale - 0.5)
            frame = Rectangle(corner, w * scale, h * scale, fill=False, edgecolor="red")
            cells[0].add_patch(frame)
        cells[0].set_title(row.title.replace(", ", "\n"), fontsize=8)
        token = (row.token[1] - left - 0.5, row.token[0] - top - 0.5)
        for cell, values, level in zip(cells[1:], row.maps, row.levels, strict=False):
            cell.imshow(values[window], cmap="viridis", vmin=0.0, interpolation="nearest")
            cell.add_patch(Rectangle(token, 1, 1, fill=False, edgecolor="red", linewidth=2))
            cell.set_title(f"level {level:.2f}", fontsize=8)
    with storage.atomic_file(url) as path, path.open("wb") as file:
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=120)
