"""Results of evaluations and where they lie. Neither torch nor Ray is needed to read them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from diffit_train import storage
from diffit_train.checkpoints import checkpoint_digest, step_name
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError, UserError


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

    `metrics` holds `fd_NAME`, `precision`, `recall` and `label_agreement`, the share of pictures
    in which the feature network's classifier sees the class that was asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    step: int
    key: str
    samples: int
    metrics: dict[str, float]
    grid: str
    seconds: float
    evaluate: dict[str, Any]
    recipe_hash: str
    mlflow_run_id: str


def features_url(recipe: Recipe) -> str:
    """Folder of the recipe's feature network."""
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


def evaluation_key(recipe: Recipe, run_url: str, step: int) -> str:
    """A readable name, made unique by a hash of all that determines the figures."""
    evaluate = recipe.evaluate
    identity = [
        recipe.evaluate_identity(),
        recipe.train_hash(),
        checkpoint_digest(run_url, step),
        features_info(recipe).sha256,
    ]
    sampler, guidance = evaluate.sampler, evaluate.guidance
    name = f"{sampler.name}{sampler.steps}-{guidance.kind}{guidance.scale:g}"
    return f"{name.replace('_', '')}-{storage.digest(identity)[:10]}"


def evaluation_url(recipe: Recipe, run: str, step: int, key: str) -> str:
    """Folder of an evaluation."""
    return storage.join(recipe.storage.root, "evaluations", run, step_name(step), key)


def finished(recipe: Recipe, run: str, step: int) -> Result | None:
    """The result of an evaluation; None where it is to be done."""
    run_url = storage.join(recipe.storage.root, "runs", run)
    key = evaluation_key(recipe, run_url, step)
    url = storage.join(evaluation_url(recipe, run, step, key), "result.json")
    if not storage.exists(url):
        return None
    try:
        return Result.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise DiffitError(f"{url} is damaged; delete it and evaluate again") from error
