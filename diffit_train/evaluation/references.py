"""Features of the real pictures, computed once and kept by content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.sources import list_pictures, read_items
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.features import FeatureNetwork
from diffit_train.evaluation.metrics import Moments
from diffit_train.progress import Progress

BATCH = 256


@dataclass(frozen=True)
class Reference:
    """Sums over all real pictures (for the Frechet distance), and features of some, (n, D)."""

    moments: Moments
    features: np.ndarray


def load_reference(recipe: Recipe, network: FeatureNetwork) -> Reference:
    """The reference of the recipe's pictures, made where it is missing.

    Raises:
        UserError: the pictures are missing, or fewer than two can be read.
    """
    listing = list_pictures(recipe)
    identity = storage.digest(
        [
            listing.digest(),
            network.info.sha256,
            recipe.data.resolution,
            recipe.evaluate.reference_pictures,
        ]
    )
    name = f"{recipe.data.name}-{recipe.evaluate.features.name}-{identity[:12]}.safetensors"
    url = storage.join(recipe.storage.root, "references", name)
    if storage.exists(url):
        return _read(url, identity)
    reference = _compute(recipe, network)
    with storage.atomic_file(url) as path:
        tensors = {
            "total": reference.moments.total,
            "outer": reference.moments.outer,
            "features": reference.features,
        }
        count = str(reference.moments.count)
        save_file(tensors, str(path), metadata={"identity": identity, "count": count})
    return reference


def _read(url: str, identity: str) -> Reference:
    try:
        with storage.local_copy(url) as path, safe_open(str(path), framework="np") as file:
            metadata = file.metadata()
            if metadata["identity"] != identity:
                raise DiffitError(f"{url} is of other pictures; delete it and evaluate again")
            total, outer, features = (file.get_tensor(k) for k in ("total", "outer", "features"))
    except SafetensorError as error:
        raise DiffitError(f"{url} is damaged ({error}); delete it and evaluate again") from error
    return Reference(Moments(int(metadata["count"]), total, outer), features)


def _compute(recipe: Recipe, network: FeatureNetwork) -> Reference:
    listing = list_pictures(recipe)
    wanted = recipe.evaluate.reference_pictures
    # Pictures are sorted by class, so those kept are spread evenly over the whole list.
    kept = set(np.linspace(0, len(listing) - 1, min(wanted, len(listing))).round().astype(int))
    parts: list[Moments] = []
    chosen: list[np.ndarray] = []
    with Progress("reference", len(listing), "pictures") as progress:
        for start in range(0, len(listing), BATCH):
            items = listing.items[start : start + BATCH]
            pictures = read_items(listing.url, listing.kind, items, recipe.data.resolution)
            if pictures.kept:
                features, _ = network.extract(pictures.pixels)
                parts.append(Moments.of(features))
                rows = [i for i, p in enumerate(pictures.kept) if start + p in kept]
                chosen.append(features[rows])
            progress.update(min(start + BATCH, len(listing)))
    if sum(part.count for part in parts) < 2:
        raise UserError(f"fewer than two pictures of {listing.url} can be read")
    return Reference(sum(parts[1:], start=parts[0]), np.concatenate(chosen))
