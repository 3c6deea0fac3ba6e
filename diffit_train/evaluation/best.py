"""The best evaluated checkpoint of a run, tagged and registered in MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.evaluation.result import Result, evaluated_identity
from diffit_train.metric_names import distance_name
from diffit_train.progress import say
from diffit_train.runs.checkpoints import committed_steps, reconstructed_url
from diffit_train.runs.identity import run_url
from diffit_train.tracking import Tracker, first_line, unreachable_errors


def best_metric(recipe: Recipe) -> str:
    """The metric that ranks checkpoints; lower is better."""
    features = recipe.evaluate.features
    return distance_name("fd", features.name, features.published)


def best_result(recipe: Recipe, run: str) -> Result | None:
    """The run's evaluation with the smallest distance among those with the recipe's settings.

    None if there is none.
    """
    identity, metric = evaluated_identity(recipe), best_metric(recipe)
    found = [
        result
        for result in _results(recipe, run)
        if result.evaluate == identity and result.recipe_hash == recipe.train_hash()
    ]
    return min(found, key=lambda result: result.metrics[metric], default=None)


def _results(recipe: Recipe, run: str) -> Iterator[Result]:
    """The results of a run's evaluations; lists none of their thousands of chunks."""
    run_folder = storage.join(recipe.storage.root, "evaluations", run)
    for step in storage.list_names(run_folder):
        if not step.startswith("step-"):
            continue  # the folder of the sweeps
        for key in storage.list_names(storage.join(run_folder, step)):
            try:
                data = storage.read_bytes(storage.join(run_folder, step, key, "result.json"))
                yield Result.model_validate_json(data)
            except (FileNotFoundError, ValidationError):
                continue  # unfinished, or written by an earlier version


def register_best(recipe: Recipe, run: str) -> dict[str, Any] | None:
    """Tag a run's best checkpoint in MLflow, and register its weights under the alias `best`.

    The best checkpoint has the smallest distance among evaluations with the same settings, outside
    sweeps. Its weights are exported, so they outlive the checkpoint.

    Returns:
        step, value and file of the best; None if nothing was evaluated.
    """
    best = best_result(recipe, run)
    if best is None:
        return None
    metric = best_metric(recipe)
    found: dict[str, Any] = {"step": best.step, metric: best.metrics[metric]}
    try:
        tracker = Tracker.of(recipe)
        tracker.tag_best(best.mlflow_run_id, best.step, metric, best.metrics[metric])
    except unreachable_errors() as error:
        say(f"could not tag the best checkpoint in MLflow: {first_line(error)}")
        return found
    if recipe.tracking.register_best:
        found["file"] = _register(recipe, run, best, tracker)
    return found


def _register(recipe: Recipe, run: str, best: Result, tracker: Tracker) -> str | None:
    """Export and register the best weights unless they are; their file if newly registered."""
    from diffit_train.runs import import_export

    name = f"{recipe.tracking.experiment}-{run}"
    metric, weights = best_metric(recipe), recipe.evaluate.weights
    shown = f"step {best.step:,}, {metric} {best.metrics[metric]:.4g}"
    try:
        if tracker.registered_step(name) == best.step:
            return None
        if best.step not in committed_steps(run_url(recipe, run)):
            say(f"best so far: {shown}; not registered: its checkpoint was deleted")
            return None
        width = recipe.evaluate.reconstructed
        if width is None:
            file = import_export.export_weights(recipe, run, best.step, weights, None)
        else:
            file = reconstructed_url(run_url(recipe, run), width, best.step)
        tags = {"step": best.step, metric: best.metrics[metric], "weights": weights}
        tracker.register(name, file, best.mlflow_run_id, tags)
    except unreachable_errors() as error:
        say(f"best so far: {shown}; not registered: {first_line(error)}")
        return None
    say(f"best so far: {shown}; registered {storage.display_path(file)} in MLflow as {name}@best")
    return file
