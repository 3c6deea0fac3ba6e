"""Results of evaluations and their URLs. Reading them needs neither torch nor Ray."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation.features import features_digest
from diffit_train.evaluation.reference_files import reference_identity
from diffit_train.runs.checkpoints import checkpoint_digest, step_name
from diffit_train.runs.identity import run_url


class Result(storage.SealedRecord):
    """result.json, the commit marker of an evaluation.

    `metrics` has `fid`, `sfid`, `inception_score` and `kid` for the published Inception, else
    `fd_NAME` and `kd_NAME`. If the reference has images, it also has `precision` and `recall`, from
    exact distances (only `diffit evaluate --conformance` rounds them like ADM's evaluator). With a
    classifier it has `classifier_accuracy`, the fraction of images classified as the requested
    class. `idle_share` is the fraction of the time in which actors existed but did not work, since
    the images of the evaluation before were complete; null if no actor was needed.
    `keep_images` is evaluate.keep_images; "" in results of earlier versions, which kept all.
    `reference_digest` identifies the reference: the SHA-256 of a reference file, else a hash of
    images and features, or "" in results of earlier versions.
    """

    run: str
    step: int
    key: str
    samples: int
    metrics: dict[str, float]
    grid: str
    seconds: float
    idle_share: float | None = None
    keep_images: str = ""
    nfe: float
    evaluate: dict[str, Any]
    reference_digest: str = ""
    recipe_hash: str
    mlflow_run_id: str


def evaluated_identity(recipe: Recipe) -> dict[str, Any]:
    """The keys that determine the metrics, with the reference's identity instead of its path.

    With a reference that is not downloaded yet, this matches no existing evaluation.
    """
    return {**recipe.evaluate_identity(), "reference": reference_identity(recipe)}


def evaluation_key(recipe: Recipe, source: str, step: int) -> str:
    """A readable name, made unique by a hash of everything that determines the metrics."""
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
    """The result of an evaluation; None if it is not done."""
    key = evaluation_key(recipe, run_url(recipe, run), step)
    url = storage.join(evaluation_url(recipe, run, step, key), "result.json")
    if not storage.exists(url):
        return None
    try:
        return Result.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise DiffitError(f"{url} is damaged; delete it and evaluate again") from error
