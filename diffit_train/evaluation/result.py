"""Results of evaluations and where they lie. Neither torch nor Ray is needed to read them."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.evaluate import PUBLISHED
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.reference_files import reference_identity
from diffit_train.runs.checkpoints import checkpoint_digest, step_name
from diffit_train.runs.identity import run_url

# Of the published weights, pt_inception-2015-12-05-6726825d.pth.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class FeaturesInfo(BaseModel):
    """features.json, the commit marker of a fitted feature network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: str
    resolution: int
    classes: list[str]
    channels: list[int]
    features: int
    held_out_accuracy: float
    sha256: str


class Result(BaseModel):
    """result.json, the commit marker of an evaluation.

    `metrics` holds, with the published Inception, `fid`, `sfid`, `inception_score` and `kid`, else
    `fd_NAME` and `kd_NAME`; with either, `precision` and `recall`, where the reference has
    images (exact distances; only `diffit evaluate --conformance` rounds them as ADM's evaluator
    does); with a classifier `classifier_accuracy`, the share of images in which it sees the class
    that was asked for. `reference_digest` tells what they were measured against: the SHA-256 of a
    reference file, else a hash of images and features; "" where an earlier version did not say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    step: int
    key: str
    samples: int
    metrics: dict[str, float]
    grid: str
    seconds: float
    nfe: float
    evaluate: dict[str, Any]
    reference_digest: str = ""
    recipe_hash: str
    mlflow_run_id: str


def features_url(recipe: Recipe) -> str:
    """Folder of the recipe's feature network, or Inception's weight file."""
    if recipe.evaluate.features.source == PUBLISHED:
        return PUBLISHED
    return storage.resolve(recipe.storage.root, recipe.evaluate.features.source)


def features_info(recipe: Recipe) -> FeaturesInfo:
    """What the recipe's feature network is.

    Raises:
        UserError: it has not been fitted, or for another resolution or number of classes.
        DiffitError: its marker is damaged.
    """
    url = features_url(recipe)
    try:
        data = storage.read_bytes(storage.join(url, "features.json"))
        info = FeaturesInfo.model_validate_json(data)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no feature network in {url}; run `diffit features fit`, or set "
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


def features_digest(recipe: Recipe) -> str:
    """SHA-256 of the feature network's weights.

    Raises:
        UserError: it has not been fitted, or its weight file is not there.
    """
    section = recipe.evaluate.features
    if section.kind == "classifier":
        return features_info(recipe).sha256
    if section.published:
        return INCEPTION_SHA256
    return _file_digest(features_url(recipe))


@functools.cache
def _file_digest(url: str) -> str:
    if not storage.exists(url):
        raise UserError(f"evaluate.features.source {url} does not exist")
    with storage.local_copy(url) as path:
        return storage.sha256_file(path)


def evaluated_identity(recipe: Recipe) -> dict[str, Any]:
    """The keys that determine the metrics, the reference by what it is instead of where it lies.

    That of a reference not yet downloaded is of no evaluation that there is.
    """
    return {**recipe.evaluate_identity(), "reference": reference_identity(recipe)}


def evaluation_key(recipe: Recipe, source: str, step: int) -> str:
    """A readable name, made unique by a hash of all that determines the metrics."""
    evaluate = recipe.evaluate
    identity = [
        evaluated_identity(recipe),
        recipe.train_hash(),
        checkpoint_digest(source, step),
        features_digest(recipe),
    ]
    sampler, guidance = evaluate.sampler, evaluate.guidance
    name = f"{sampler.name}{sampler.steps}-{guidance.kind}{guidance.scale:g}"
    return f"{name.replace('_', '')}-{storage.digest(identity)[:10]}"


def evaluation_url(recipe: Recipe, run: str, step: int, key: str) -> str:
    """Folder of an evaluation."""
    return storage.join(recipe.storage.root, "evaluations", run, step_name(step), key)


def finished_result(recipe: Recipe, run: str, step: int) -> Result | None:
    """The result of an evaluation; None where it is to be done."""
    key = evaluation_key(recipe, run_url(recipe, run), step)
    url = storage.join(evaluation_url(recipe, run, step, key), "result.json")
    if not storage.exists(url):
        return None
    try:
        return Result.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise DiffitError(f"{url} is damaged; delete it and evaluate again") from error
