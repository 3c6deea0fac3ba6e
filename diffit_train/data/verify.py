"""`diffit verify latents`: check shards against the manifest, and report latent statistics.

Checks every member's shape, label and finiteness, and every count and hash. Can draw original
images above their reconstructions, and re-encode bad shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe_text
from diffit_train.data.encode_plan import (
    REPAIR,
    read_inputs,
    read_plan,
    repair_specs,
)
from diffit_train.data.shards import (
    MANIFEST,
    Manifest,
    Shard,
    ShardEntry,
    as_float,
    load_manifest,
    read_shard,
)
from diffit_train.data.sources import ImageList, list_images
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import Progress, say

THREADS = 4
_REWRITE = "write it again with `diffit recipe show` and the recipe of the latents"
# Number of originals and reconstructions to draw.
SHOWN = 8


@dataclass
class Report:
    """The findings; `bad` holds a reason for each bad shard."""

    url: str
    shards: int
    images: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    total: Any = 0.0
    squares: Any = 0.0
    values: int = 0
    lowest: float = float("inf")
    highest: float = float("-inf")

    def as_json(self) -> dict[str, Any]:
        """The report as JSON; mean and standard deviation are of the scaled means, by channel."""
        mean = np.asarray(self.total) / max(1, self.values)
        spread = np.sqrt(np.maximum(np.asarray(self.squares) / max(1, self.values) - mean**2, 0))
        return {
            "latents": self.url,
            "shards": self.shards,
            "images": self.images,
            "bad": self.bad,
            "mean": np.atleast_1d(mean).tolist(),
            "std": np.atleast_1d(spread).tolist(),
            "lowest": self.lowest if self.images else None,
            "highest": self.highest if self.images else None,
        }


def verify(url: str) -> Report:
    """Read every shard of a folder of latents.

    Raises:
        UserError: the folder has no finished latents.
    """
    manifest = load_manifest(url)
    report = Report(url, len(manifest.shards))
    total = sum(entry.count for entry in manifest.shards)
    read = 0
    seen = np.zeros(sum(manifest.segments), dtype=bool)
    with ThreadPoolExecutor(THREADS) as pool, Progress("verify", total, "images") as progress:
        results = pool.map(lambda entry: _read_good(url, manifest, entry), manifest.shards)
        for entry, result in zip(manifest.shards, results, strict=True):
            if isinstance(result, str):
                report.bad[entry.name] = result
            elif seen[result.keys].any():
                report.bad[entry.name] = "it holds an image that is in another shard"
            else:
                seen[result.keys] = True
                _add(report, manifest, result)
            read += entry.count
            progress.update(read)
    _check_totals(manifest, report)
    return report


def _read_good(url: str, manifest: Manifest, entry: ShardEntry) -> Shard | str:
    """The shard, or what is wrong with it."""
    try:
        shard = read_shard(url, entry)
    except DiffitError as error:
        return str(error).partition(";")[0]
    # Raised by tarfile, NumPy and int for malformed members.
    except (ValueError, KeyError, EOFError, OSError) as error:
        return f"a member cannot be read: {type(error).__name__}: {error}"
    if shard.moments.shape[1:] != manifest.member_shape:
        return f"latents have shape {shard.moments.shape[1:]}, not {manifest.member_shape}"
    if shard.moments.dtype not in (np.float16, np.uint8):
        return f"latents are {shard.moments.dtype}, not float16 or uint8"
    if not np.isfinite(shard.moments).all():
        return "latents are NaN or infinite"
    if not ((shard.labels >= 0) & (shard.labels < len(manifest.classes))).all():
        return "labels are out of range"
    if shard.keys[0] != entry.first_index or not _keys_fit(manifest, shard.keys):
        return "keys are not those that were encoded into it"
    return shard


def _keys_fit(manifest: Manifest, keys: np.ndarray) -> bool:
    """Whether keys are all of one segment."""
    ends = np.cumsum(manifest.segments)
    segments = np.unique(np.searchsorted(ends, keys, side="right"))
    return len(segments) == 1 and bool(segments[0] < len(ends))


def _add(report: Report, manifest: Manifest, shard: Shard) -> None:
    values = as_float(shard.moments[:, :, : manifest.channels])
    means = values.astype(np.float64) * manifest.scale
    report.images += len(shard.keys)
    report.total = report.total + means.sum((0, 1, 3, 4))
    report.squares = report.squares + (means**2).sum((0, 1, 3, 4))
    report.values += means.size // manifest.channels
    report.lowest = min(report.lowest, float(means.min()))
    report.highest = max(report.highest, float(means.max()))


def _check_totals(manifest: Manifest, report: Report) -> None:
    totals = manifest.totals
    recorded = sum(entry.count for entry in manifest.shards)
    if recorded != totals.written or totals.written + totals.rejected != totals.input:
        report.bad[MANIFEST] = (
            f"totals do not add up: {recorded} in shards, {totals.written} written, "
            f"{totals.rejected} rejected, {totals.input} in the input"
        )


# ---- Repairing bad shards ----


def recipe_of(url: str) -> Recipe:
    """The recipe stored in a folder ROOT/latents/NAME; its root and `data.name` are these.

    Raises:
        UserError: it is missing, or the folder is not in a project.
    """
    if not storage.parent(url).endswith("/latents"):
        raise UserError(
            f"{url} is not in ROOT/latents/, so its images and autoencoder cannot be located; move "
            "it there, or pass --no-image to check only its shards"
        )
    name = storage.join(url, "recipe.yaml")
    try:
        text = storage.read_bytes(name).decode()
        recipe = load_recipe_text(text, name, root=storage.parent(url, 2))
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing, so the images cannot be located") from error
    except (UnicodeDecodeError, UserError) as error:
        raise UserError(f"{name} is damaged: {error}; {_REWRITE}") from error
    if recipe.encode_hash() != load_manifest(url).recipe_hash:
        raise UserError(f"{name} is damaged: its hash is not that of {MANIFEST}; {_REWRITE}")
    data = recipe.data.model_copy(update={"name": url.rstrip("/").rsplit("/", 1)[-1]})
    return recipe.model_copy(update={"data": data})


def repair(url: str, names: list[str], address: str | None = None) -> Manifest:
    """Re-encode these shards from the images, and rewrite the manifest.

    Raises:
        UserError: the images have changed since they were encoded.
    """
    from diffit_train.data.encode import encode_again

    manifest, recipe = load_manifest(url), recipe_of(url)
    started = read_plan(url)
    if started is not None and started.input_sha256 != REPAIR:
        raise UserError(
            f"encoding to {url} is in progress; finish it first with `diffit encode --append`"
        )
    by_key = _items_by_key(recipe, url)
    specs = repair_specs(manifest, by_key, names)
    repaired = {}
    for part in encode_again(recipe, url, by_key, specs, address):
        if part.entry is None or part.autoencoder_sha256 != manifest.autoencoder_sha256:
            raise DiffitError(
                f"shard {part.number} of {url} cannot be repaired: its images are no longer "
                "readable, or the autoencoder has changed; restore them and rerun --repair"
            )
        repaired[part.entry.name] = part.entry
    shards = [repaired.get(entry.name, entry) for entry in manifest.shards]
    for before, after in zip(manifest.shards, shards, strict=True):
        if before.count != after.count:
            raise DiffitError(
                f"{before.name} held {before.count} images, but only {after.count} are readable "
                "now; fix the source and rerun --repair"
            )
        if before.sha256 != after.sha256:
            say(f"{before.name} was re-encoded with different bytes (different hardware?)")
    manifest = manifest.model_copy(update={"shards": shards})
    storage.write_text(storage.join(url, MANIFEST), manifest.sealed())
    storage.remove(storage.join(url, "parts"))
    return manifest


def _items_by_key(recipe: Recipe, url: str) -> ImageList:
    """The images of the source, in key order."""
    listing = list_images(recipe)
    here = {item.name: item for item in listing.items}
    inputs = read_inputs(url)
    gone = [name for name, label in inputs if name not in here or here[name].label != label]
    if gone:
        raise UserError(
            f"{len(gone):,} encoded images were removed from {listing.url} or relabeled, such as "
            f"{gone[0]}; restore them, or re-encode under another data.name"
        )
    items = [here[name] for name, _ in inputs]
    return replace(listing, items=items)


# ---- Drawing reconstructions ----


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
    by_key = _items_by_key(recipe, url)
    keys, moments = _evenly_spaced_samples(url, manifest)
    chosen = [by_key.items[key] for key in keys]
    originals = read_items(by_key.source, chosen, recipe.data.resolution).pixels
    autoencoder = load_autoencoder(recipe, torch.device("cpu"))
    means = torch.from_numpy(as_float(moments[:, 0, : manifest.channels]))
    decoded = autoencoder.decode(means * manifest.scale)
    error = float(((to_model_range(originals) - to_model_range(decoded)) ** 2).mean())
    names = [by_key.classes[item.label] for item in chosen]
    _draw_rows(originals, decoded, names, f"{storage.display_path(url)}: mse {error:.4g}", image)
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


def _rows(originals: np.ndarray, decoded: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "original", originals
    yield "decoded", decoded


def _draw_rows(
    originals: np.ndarray, decoded: np.ndarray, names: list[str], title: str, image: str
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(names) + 0.8, 3.4), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for row, (label, images) in zip(axes, _rows(originals, decoded), strict=True):
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
