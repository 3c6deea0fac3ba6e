"""The feature networks: Inception, or your own small classifier.

A Frechet distance on the classifier's features is called fd_NAME, never FID.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.evaluate import FEATURES as FEATURE_KINDS
from diffit_train.config.evaluate import CustomFeatures
from diffit_train.config.plugins import require
from diffit_train.data.fit import BATCH_SIZE, SEED, fit
from diffit_train.data.preprocess import to_model_range
from diffit_train.data.reading import read_items
from diffit_train.data.sources import list_images
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.chunks import FEATURES, LOGITS, PREDICTIONS, SPATIAL
from diffit_train.evaluation.features import (
    FeaturesInfo,
    classifier_fit,
    features_digest,
    features_info,
    features_url,
)
from diffit_train.evaluation.inception import Inception, load_inception
from diffit_train.progress import say

WEIGHTS = "model.safetensors"
CLASSIFIER_STATE = "fit-state.safetensors"
# Fraction of the images that is held out to measure accuracy.
HELD_OUT_FRACTION = 0.2
# Images are shifted randomly by up to this many pixels during fitting, against overfitting.
SHIFT_PIXELS = 1


class Classifier(nn.Module):
    """Strided convolutions (except the first) with SiLU, then linear features and logits."""

    def __init__(self, resolution: int, classes: int, channels: list[int], features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous, side = 3, resolution
        for number, width in enumerate(channels):
            stride = 1 if number == 0 else 2
            layers += [nn.Conv2d(previous, width, 3, stride=stride, padding=1), nn.SiLU()]
            previous, side = width, -(-side // stride)
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.to_features = nn.Linear(previous * side**2, features)
        self.to_classes = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, R, R) in [-1, 1] to features (B, D) and logits (B, classes)."""
        features = self.to_features(self.body(x))
        return features, self.to_classes(nn.functional.silu(features))

    @torch.no_grad()
    def extract(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """As `FeatureNetwork.extract`."""
        x = torch.from_numpy(to_model_range(pixels)).to(self.to_features.weight.device)
        features, logits = self(x)
        return {FEATURES: features.cpu().numpy(), PREDICTIONS: logits.argmax(1).cpu().numpy()}


class FeatureNetwork(Protocol):
    """A network on a device.

    One of another package is made as `Network(source, device, **options)`: the local path of
    `evaluate.features.source`, which may be gone later, or None without one; a torch device;
    `evaluate.features.options`. Only its `features` are used.
    """

    def extract(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Images (B, R, R, 3) uint8 to named arrays with one row per image.

        Always `features` (B, D), float32. Inception adds `spatial` (B, 2023) and `logits`
        (B, 1008), float32; a classifier adds `seen` (B,), its predicted classes, int64.
        """


class _InceptionFeatures:
    def __init__(self, model: Inception, device: torch.device) -> None:
        self.model, self.device = model, device

    @torch.no_grad()
    def extract(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        out = self.model(torch.from_numpy(pixels).to(self.device))
        return {
            FEATURES: out.pool.cpu().numpy(),
            SPATIAL: out.spatial.cpu().numpy(),
            LOGITS: out.logits.cpu().numpy(),
        }


class _CustomFeatures:
    """A network of another package; what it returns is checked."""

    def __init__(self, recipe: Recipe, section: CustomFeatures, device: torch.device) -> None:
        # The hash of its file, if it has one, is that of its first use.
        features_digest(recipe)
        file = section.source and storage.local_copy(features_url(recipe))
        with file or nullcontext() as path:
            source = None if path is None else str(path)
            network = FEATURE_KINDS.make(section.kind, section.options, source, device)
        require(FEATURE_KINDS.key, section.kind, network, ["extract"])
        self.name, self.network = section.kind, network

    def extract(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        rows: dict[str, np.ndarray] = self.network.extract(pixels)
        features = rows.get(FEATURES) if isinstance(rows, dict) else None
        shape = getattr(features, "shape", None)
        if features is None or len(features.shape) != 2 or len(features) != len(pixels):
            raise UserError(
                f"{FEATURE_KINDS.key} is {self.name!r}, whose extract returned "
                f"{type(rows).__name__ if shape is None else f'{FEATURES} of shape {shape}'} for "
                f"{len(pixels)} images; it must return a dictionary with {FEATURES!r}, one row of "
                "float32 per image"
            )
        return {FEATURES: np.asarray(features, np.float32)}


def load_features(recipe: Recipe, device: torch.device) -> FeatureNetwork:
    """The recipe's feature network, after verifying the hash of its weights.

    Raises:
        UserError: it has not been fitted, or its weights do not match its name.
        DiffitError: its weights are damaged.
    """
    section = recipe.evaluate.features
    if isinstance(section, CustomFeatures):
        return _CustomFeatures(recipe, section, device)
    url = features_url(recipe)
    if section.kind == "inception":
        network, _ = load_inception(url, device, any_weights=not section.published)
        return _InceptionFeatures(network, device)
    info = features_info(recipe)
    with storage.local_copy(storage.join(url, WEIGHTS)) as path:
        if not path.exists() or storage.sha256_file(path) != info.sha256:
            raise DiffitError(f"{url}/{WEIGHTS} is missing or damaged; delete {url} and fit again")
        weights = load_file(path)
    model = Classifier(info.resolution, len(info.classes), info.channels, info.features)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


def fit_features(recipe: Recipe) -> FeaturesInfo:
    """Fit the recipe's feature network; keep a finished one, resume a killed fit.

    Raises:
        UserError: the folder holds another network, or the images cannot be read.
    """
    url, fit = features_url(recipe), classifier_fit(recipe).model_dump(mode="json")
    identity = storage.digest([recipe.image_identity(), fit])
    if storage.exists(storage.join(url, "features.json")):
        info = features_info(recipe)
        if info.identity != identity:
            raise UserError(
                f"{url} holds the feature network of another recipe; set evaluate.features.source "
                "to another folder, or delete that one"
            )
        say(f"feature network {storage.display_path(url)} is already fitted")
        return info
    storage.require_writable(recipe.storage.root)
    info = fit_classifier(recipe, identity)
    accuracy = f"held-out accuracy {info.held_out_accuracy:.1%}"
    say(f"feature network {storage.display_path(url)}: {accuracy}")
    return info


def fit_classifier(recipe: Recipe, identity: str) -> FeaturesInfo:
    """Fit the classifier on the recipe's images, measure its held-out accuracy, and save it."""
    section, url = classifier_fit(recipe), features_url(recipe)
    listing = list_images(recipe)
    images = read_items(listing.source, listing.items, recipe.data.resolution)
    labels = np.array(listing.labels)[images.kept]
    order = np.random.Generator(np.random.Philox(SEED)).permutation(len(labels))
    held_out, used = np.split(order, [max(1, round(HELD_OUT_FRACTION * len(labels)))])
    if not len(used):
        raise UserError(f"{listing.url} has too few images to fit a classifier: {len(labels)}")
    torch.manual_seed(SEED)
    model = Classifier(
        recipe.data.resolution, len(listing.classes), list(section.channels), section.features
    )
    x, y = torch.from_numpy(to_model_range(images.pixels)), torch.from_numpy(labels)

    def loss(step: int, random: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.from_numpy(random.choice(used, size=BATCH_SIZE))
        rolls = random.integers(-SHIFT_PIXELS, SHIFT_PIXELS + 1, size=2).tolist()
        _, logits = model(torch.roll(x[rows], rolls, dims=(2, 3)))
        value = nn.functional.cross_entropy(logits, y[rows])
        return value, {"cross-entropy": value.item()}

    fit(
        model,
        loss,
        steps=section.steps,
        lr=section.lr,
        state_url=storage.join(url, CLASSIFIER_STATE),
        identity=identity,
        title="features",
    )
    with torch.no_grad():
        predictions = model(x[held_out])[1].argmax(1)
    accuracy = float((predictions == y[held_out]).double().mean())
    with storage.atomic_file(storage.join(url, WEIGHTS)) as path:
        save_file(model.state_dict(), str(path))
        sha256 = storage.sha256_file(path)
    info = FeaturesInfo(
        identity=identity,
        resolution=recipe.data.resolution,
        classes=list(listing.classes),
        channels=list(section.channels),
        features=section.features,
        held_out_accuracy=accuracy,
        sha256=sha256,
    )
    storage.write_text(storage.join(url, "features.json"), info.model_dump_json(indent=1))
    storage.remove(storage.join(url, CLASSIFIER_STATE))
    return info
