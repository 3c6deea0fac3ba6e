"""An image file of images above what the autoencoder makes of their latents."""

from __future__ import annotations

import numpy as np

from diffit_train import storage
from diffit_train.data.encode_plan import encoded_items
from diffit_train.data.manifest import Manifest, load_manifest, read_inputs, recipe_of
from diffit_train.data.shards import as_float, read_shard
from diffit_train.data.sources import list_images

# Number of originals and reconstructions to draw.
SHOWN = 8


def draw_reconstructions(url: str, image: str) -> float:
    """Write a PNG of originals above reconstructions; their mean squared error in [-1, 1].

    Args:
        url: folder of intact latents.
        image: URL of the PNG.

    Raises:
        UserError: the images or the autoencoder are not available.
    """
    import torch

    from diffit_train.data.autoencoder import load_autoencoder
    from diffit_train.data.preprocess import to_model_range
    from diffit_train.data.reading import read_items

    manifest, recipe = load_manifest(url), recipe_of(url)
    listing = list_images(recipe)
    items = encoded_items(listing, read_inputs(url))
    keys, moments = _evenly_spaced_samples(url, manifest)
    chosen = [items[key] for key in keys]
    originals = read_items(listing.source, chosen, recipe.data.resolution).pixels
    autoencoder = load_autoencoder(recipe, torch.device("cpu"))
    means = torch.from_numpy(as_float(moments[:, 0, : manifest.channels]))
    decoded = autoencoder.decode(means * manifest.scale)
    error = float(((to_model_range(originals) - to_model_range(decoded)) ** 2).mean())
    names = [listing.classes[item.label] for item in chosen]
    draw_rows(originals, decoded, names, f"{storage.display_path(url)}: mse {error:.4g}", image)
    return error


def _evenly_spaced_samples(url: str, manifest: Manifest) -> tuple[list[int], np.ndarray]:
    """Keys and moments of evenly spaced images."""
    counts = np.cumsum([entry.count for entry in manifest.shards])
    wanted = np.unique(np.linspace(0, counts[-1] - 1, min(SHOWN, int(counts[-1]))).astype(int))
    keys, moments = [], []
    for index in wanted.tolist():
        number = int(np.searchsorted(counts, index, side="right"))
        shard = read_shard(url, manifest.shards[number])
        offset = index - int(counts[number] - len(shard.keys))
        keys.append(int(shard.keys[offset]))
        moments.append(shard.moments[offset])
    return keys, np.stack(moments)


def draw_rows(
    originals: np.ndarray, decoded: np.ndarray, names: list[str], title: str, image: str
) -> None:
    """Write a PNG of images (n, R, R, 3) above their reconstructions, with a name for each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(names) + 0.8, 3.4), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for row, label, images in zip(axes, ("original", "decoded"), (originals, decoded), strict=True):
        for cell, pixels in zip(row, images, strict=True):
            cell.imshow(pixels, interpolation="nearest")
            cell.set_axis_off()
        row[0].text(
            -0.08, 0.5, label, transform=row[0].transAxes, ha="right", va="center", rotation=90
        )
    for cell, name in zip(axes[0], names, strict=True):
        cell.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=9)
    with storage.atomic_file(image) as path, path.open("wb") as file:
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=150)
