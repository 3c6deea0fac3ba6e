"""`diffit evaluate` and `diffit references`: resumable work on Ray actors.

Each chunk of images, and each part of a reference, is committed as soon as it is done. A rerun
computes only what is missing, and the result does not depend on the number of actors or on their
failures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffit_train import ray_session, storage
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation import chunks, references
from diffit_train.evaluation.actors import EvaluationPool, EvaluationTarget
from diffit_train.evaluation.chunks import LABELS
from diffit_train.evaluation.features import features_digest
from diffit_train.evaluation.generate import class_names, guidance_saving, nfe_per_image
from diffit_train.evaluation.grid import draw_grid
from diffit_train.evaluation.labels import choose_labels
from diffit_train.evaluation.references import FoundReference, Reference
from diffit_train.evaluation.result import (
    Result,
    evaluated_identity,
    evaluation_key,
    evaluation_url,
    finished_result,
)
from diffit_train.evaluation.scores import MetricSuite
from diffit_train.metric_names import EVALUATION, NFE
from diffit_train.progress import say
from diffit_train.runs.checkpoints import State, checkpoint_digest, checkpoint_url, read_state
from diffit_train.runs.identity import run_url
from diffit_train.tracking import TAG_REFERENCE, Tracker, first_line, unreachable_errors


@dataclass(frozen=True)
class Request:
    """An evaluation of a checkpoint.

    Attributes:
        sweep: name of the sweep that it belongs to, or "".
        npz: write samples.npz next to the result.
        curve: prefix of its metrics in the training run's curves over steps. Evaluations of a
            sweep are not logged there: there would be many at one step.
    """

    recipe: Recipe
    run: str
    step: int
    sweep: str = ""
    npz: bool = False
    curve: Literal["eval", "validation"] = "eval"

    @property
    def finished(self) -> Result | None:
        """Its result; None if it is not done."""
        return finished_result(self.recipe, self.run, self.step)


def evaluate(requests: Sequence[Request], address: str | None = None) -> list[Result]:
    """Evaluate committed checkpoints on the Ray cluster at `address`, one after another.

    A rerun resumes. Consecutive evaluations share actors where possible.

    Raises:
        UserError: bad input; nothing was written.
        DiffitError: a chunk failed, or its metrics are not finite.
    """
    for request in requests:
        check(request.recipe)
    results: list[Result] = []
    with ray_session.connected(address):
        pool: EvaluationPool | None = None
        try:
            for request in requests:
                if pool is None or not pool.serves(request.recipe):
                    if pool is not None:
                        pool.close()
                    pool = EvaluationPool(request.recipe)
                results.append(_evaluate_one(request, pool))
        finally:
            if pool is not None:
                pool.close()
    return results


def check(recipe: Recipe) -> None:
    """Check features and reference file before anything starts.

    The images of a reference are listed later, only once: there may be millions.

    Raises:
        UserError: the features or the reference file cannot be used.
    """
    features_digest(recipe)
    references.check_reference_file(recipe)


def make_reference(recipe: Recipe, address: str | None = None) -> tuple[str, Reference]:
    """Compute or read the recipe's reference; return its URL and statistics.

    Raises:
        UserError: the images or the file cannot be used.
    """
    check(recipe)
    with ray_session.connected(address):
        pool = EvaluationPool(recipe)
        try:
            found = pool.reference()
            return found.url, found.statistics
        finally:
            pool.close()


def _evaluate_one(request: Request, pool: EvaluationPool) -> Result:
    recipe, run, step = request.recipe, request.run, request.step
    source = run_url(recipe, run)
    state = read_state(source, step)
    key = evaluation_key(recipe, source, step)
    url = evaluation_url(recipe, run, step, key)
    storage.remove_temporary(url)
    if saving := guidance_saving(recipe):
        say(saving)
    started_s = time.monotonic()
    reference = pool.reference()
    pool.generate(recipe, EvaluationTarget(source, step, url, key))
    suite, labels, shown = _measured(recipe, url, key, reference.statistics)
    metrics = suite.values()
    for warning in suite.warnings():
        say(f"note: {warning}")
    grid = storage.join(url, "grid.png")
    numbers = "   ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    draw_grid(shown, class_names(recipe), f"{run}, step {step:,}\n{numbers}", grid)
    if request.npz:
        write_npz(recipe, url, labels)
    cost = nfe_per_image(recipe)
    try:
        child = _track(request, state, key, metrics, cost, grid, reference)
    except unreachable_errors() as error:
        raise DiffitError(
            f"computed the metrics of step {step:,} ({numbers}), but could not log them to MLflow: "
            f"{first_line(error)}; rerun the same command to retry"
        ) from error
    result = Result(
        run=run,
        step=step,
        key=key,
        samples=recipe.evaluate.samples,
        metrics=metrics,
        grid=grid,
        seconds=time.monotonic() - started_s,
        nfe=cost,
        evaluate=evaluated_identity(recipe),
        reference_digest=reference.digest,
        recipe_hash=recipe.train_hash(),
        mlflow_run_id=child,
    )
    storage.write_text(storage.join(url, "result.json"), result.model_dump_json(indent=1) + "\n")
    return result


def _measured(
    recipe: Recipe, url: str, key: str, reference: Reference
) -> tuple[MetricSuite, list[np.ndarray], dict[int, list[np.ndarray]]]:
    """MetricSuite, labels per chunk, and the grid's images by class, one chunk at a time."""
    suite, labels = MetricSuite(recipe, reference), []
    shown: dict[int, list[np.ndarray]] = {}
    evaluate = recipe.evaluate
    in_grid = _grid_labels(recipe)
    for part in chunks.committed_chunks(url):
        rows = chunks.read_chunk(url, part, key)
        suite.add(rows)
        labels.append(rows[LABELS])
        wanted = [
            (index, shown.setdefault(label, []))
            for index, label in enumerate(rows[LABELS].tolist())
            if label in in_grid and len(shown.get(label, ())) < evaluate.grid_columns
        ]
        pixels = chunks.read_chunk_images(url, part) if wanted else None
        for index, row in wanted:
            if pixels is not None and len(row) < evaluate.grid_columns:
                row.append(pixels[index])
    return suite, labels, shown


def _grid_labels(recipe: Recipe) -> set[int]:
    """Labels of the grid's rows: the first that occur, as few random labels skip classes."""
    evaluate, classes = recipe.evaluate, recipe.data.num_classes
    labels = choose_labels(evaluate.labels, evaluate.seed, range(evaluate.samples), classes)
    return set(np.unique(labels)[: evaluate.grid_rows].tolist())


def write_npz(recipe: Recipe, url: str, labels: list[np.ndarray] | None = None) -> str:
    """Write an evaluation's images as samples.npz in ADM's format, unless it exists; its URL."""
    target = storage.join(url, "samples.npz")
    if not storage.exists(target):
        if labels is None:
            key = url.rstrip("/").rsplit("/", 1)[-1]
            parts = chunks.committed_chunks(url)
            labels = [chunks.read_chunk(url, part, key)[LABELS] for part in parts]
        chunks.write_samples(url, target, recipe.evaluate.samples, labels)
        say(f"images: {storage.display_path(target)}")
    return target


def _track(
    request: Request,
    state: State,
    key: str,
    metrics: dict[str, float],
    cost: float,
    grid: str,
    reference: FoundReference,
) -> str:
    """Log to a child of the training run, and to that run's own curves over steps.

    A rerun of a killed evaluation logs the same values at the same step.
    """
    recipe, run = request.recipe, request.run
    tracker, source = Tracker.of(recipe), run_url(recipe, run)
    params = {k: v for k, v in recipe.flat().items() if k.startswith("evaluate.")}
    tags = {
        "diffit.recipe_hash": recipe.train_hash(),
        "diffit.evaluation_key": key,
        "diffit.checkpoint": checkpoint_url(source, state.step),
        "diffit.checkpoint_digest": checkpoint_digest(source, state.step),
        TAG_REFERENCE: reference.digest,
        "mlflow.source.name": "diffit evaluate",
    }
    if request.sweep:
        tags["diffit.sweep"] = request.sweep
    child = tracker.evaluation_run(
        recipe.tracking.experiment,
        state.mlflow_run_id,
        f"{state.step}/{key}",
        f"{run}-step-{state.step}-{key}",
        {**params, "step": state.step, "run": run},
        tags,
    )
    name = reference.url.rsplit("/", 1)[-1].removesuffix(".safetensors")
    tracker.log_dataset(child, name, name.rsplit("-", 1)[-1], reference.url)
    named = {f"{EVALUATION}/{name}": value for name, value in metrics.items()}
    curves = [(child, {**named, NFE: cost})]
    if not request.sweep:
        own = {f"{request.curve}/{name}": value for name, value in metrics.items()}
        curves.append((state.mlflow_run_id, own))
    for run_id, values in curves:
        first = next(iter(values))
        if tracker.value_at(run_id, first, state.step) != values[first]:
            tracker.log_metrics(run_id, values, state.step)
    with storage.local_copy(grid) as path:
        tracker.log_artifact(child, path)
    tracker.finish(child)
    return child
