"""A PNG grid of samples: one row per class, with its name on the left, if there are classes."""

from __future__ import annotations

import numpy as np

from diffit_train import storage

CELL_INCHES = 0.55


def draw_grid(
    images: dict[int, list[np.ndarray]], classes: list[str] | None, title: str, url: str
) -> None:
    """Write a PNG with one row per label, or of images without labels in rows.

    Args:
        images: label, an index into `classes` or number of a row, to images (R, R, 3) uint8.
        url: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row) for row in images.values())
    size = (columns * CELL_INCHES + 1.0, len(images) * CELL_INCHES + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, (label, chosen) in zip(axes, sorted(images.items()), strict=True):
        for cell in row:
            cell.set_axis_off()
        for cell, image in zip(row, chosen, strict=False):
            cell.imshow(image, interpolation="nearest")
        if classes is not None:
            within = row[0].transAxes
            row[0].text(-0.15, 0.5, classes[label], transform=within, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    with storage.atomic_file(url) as path, path.open("wb") as file:
        FigureCanvasAgg(figure).print_figure(file, format="png")
