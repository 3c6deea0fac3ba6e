"""A picture of samples: a row for each class, its name at the left."""

from __future__ import annotations

import numpy as np

from diffit_train import storage

CELL_INCHES = 0.55


def draw_grid(
    pixels: np.ndarray,
    labels: np.ndarray,
    classes: list[str],
    size: tuple[int, int],
    title: str,
    url: str,
) -> None:
    """Write a PNG of the first pictures of the first classes.

    Args:
        pixels: (n, R, R, 3) uint8.
        labels: (n,), indices into `classes`.
        size: most rows (classes) and most columns (pictures of a class).
        url: where the PNG goes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [label for label in range(len(classes)) if (labels == label).any()][: size[0]]
    columns = min(size[1], max(int((labels == label).sum()) for label in shown))
    width = columns * CELL_INCHES + 1.0
    figure = Figure(figsize=(width, len(shown) * CELL_INCHES + 0.7), layout="constrained")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, label in zip(axes, shown, strict=True):
        chosen = pixels[labels == label][:columns]
        for cell in row:
            cell.set_axis_off()
        for cell, picture in zip(row, chosen, strict=False):
            cell.imshow(picture, interpolation="nearest")
        name = classes[label]
        row[0].text(-0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    with storage.atomic_file(url) as path, path.open("wb") as file:
        FigureCanvasAgg(figure).print_figure(file, format="png")
