"""The recipe's feature network: its URL, description and digest.

Importing this imports no torch; the networks themselves are in `feature_networks`.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.evaluate import (
    FEATURES,
    PUBLISHED,
    ClassifierFeatures,
    CustomFeatures,
    FeaturesFit,
)
from diffit_train.errors import DiffitError, UserError, redact

# Published weights, pt_inception-2015-12-05-6726825d.pth.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class FeaturesInfo(storage.Record):
    """features.json, the commit marker of a fitted feature network."""

    identity: str
    resolution: int
    classes: list[str]
    channels: list[int]
    features: int
    held_out_accuracy: float
    sha256: str


def features_url(recipe: Recipe) -> str:
    """Folder or weight file of the recipe's feature network; `PUBLISHED` as it is."""
    source = recipe.evaluate.features.source or ""
    return source if source == PUBLISHED else storage.resolve(recipe.storage.root, source)


def features_info(recipe: Recipe) -> FeaturesInfo:
    """Description of the recipe's fitted feature network.

    Raises:
        UserError: it is not fitted, or for another resolution or number of classes.
        DiffitError: its marker is damaged.
    """
    url = features_url(recipe)
    try:
        data = storage.read_bytes(storage.join(url, "features.json"))
        info = FeaturesInfo.model_validate_json(data)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no feature network in {url}; run `diffit fit features`, or set "
            "evaluate.features.source"
        ) from error
    except ValidationError as error:
        raise DiffitError(f"{url}/features.json is damaged; delete {url} and fit again") from error
    for key, mine, theirs in (
        ("data.resolution", recipe.data.resolution, info.resolution),
        ("data.num_classes", recipe.data.num_classes, len(info.classes)),
    ):
        if mine != theirs:
            raise UserError(f"{key} is {mine}, but the feature network {url} is for {theirs}")
    return info


def classifier_fit(recipe: Recipe) -> FeaturesFit:
    """How the recipe's classifier is fitted.

    Raises:
        UserError: its features are not those of a classifier.
    """
    section = recipe.evaluate.features
    if not isinstance(section, ClassifierFeatures):
        raise UserError(
            f"evaluate.features.kind is {section.kind!r}, which is not fitted; only "
            "evaluate.features.kind=classifier is"
        )
    return section.fit


def features_digest(recipe: Recipe) -> str:
    """SHA-256 of the feature network's weights.

    Raises:
        UserError: it is not fitted, or its weight file does not exist, or holds other weights
            than at its first use.
    """
    section = recipe.evaluate.features
    if isinstance(section, ClassifierFeatures):
        return features_info(recipe).sha256
    if section.published:
        return INCEPTION_SHA256
    made_of: list[Any] = []
    if isinstance(section, CustomFeatures):
        FEATURES.load(section.kind)  # named here, before anything starts
        made_of = [section.kind, section.options]
        if section.source is None:
            return storage.digest(made_of)
    url = features_url(recipe)
    sha256 = _file_digest(url)
    check_pinned_hash(recipe.storage.root, "evaluate.features.source", redact(url), sha256)
    return storage.digest([*made_of, sha256]) if made_of else sha256


@functools.cache
def _file_digest(url: str) -> str:
    if not storage.exists(url):
        raise UserError(f"evaluate.features.source {url} does not exist")
    with storage.local_copy(url) as path:
        return storage.sha256_file(path)


def check_pinned_hash(root: str, key: str, source: str, sha256: str, also: str = "") -> None:
    """Pin weights at their first use under a root; compare them with the pin at each later one.

    Without it, other weights under the same path would only show as other metrics.

    Args:
        key: of the recipe, for messages.
        source: where the weights are, without credentials.
        also: what else the pin is for, such as the precision.

    Raises:
        UserError: they are not those of their first use.
    """
    name = storage.digest([key, source, also])[:12]
    url = storage.join(root, "references", "weights", f"{name}.json")
    pin = {"source": source, "sha256": sha256}
    if not storage.exists(url):
        with contextlib.suppress(UserError):  # images can be sampled of a root that is read-only
            storage.write_json(url, pin)
    elif storage.read_json(url) != pin:
        raise UserError(
            f"{key} {source} holds other weights than at its first use under {root}: its hash is "
            f"not that of {url}; restore them, or, if you replaced them on purpose, delete that "
            "file: metrics before and after cannot be compared"
        )
