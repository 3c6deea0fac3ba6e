"""The best evaluated checkpoint of a run, tagged and registered in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.base import flatten
from diffit_train.errors import UserError, first_line
from diffit_train.evaluation.result import Result, evaluated_identity, run_results
from diffit_train.progress import say
from diffit_train.runs.checkpoints import reconstructed_url
from diffit_train.runs.run import Run
from diffit_train.tracking import (
    BEST,
    BEST_VALIDATED,
    ModelNotes,
    Registered,
    Tracker,
    distance_name,
    unreachable_errors,
)


def best_metric(recipe: Recipe) -> str:
    """The metric that ranks checkpoints; lower is better."""
    features = recipe.evaluate.features
    return distance_name("fd", features.name, features.published)


def best_result(run: Run, like: Result) -> Result:
    """The run's evaluation with the smallest distance among those by the protocol of `like`."""
    metric = best_metric(run.recipe)
    comparable = [like, *(r for r in run_results(run) if r.same_protocol(like))]
    return min(comparable, key=lambda result: result.metrics[metric])


def register_best(
    run: Run, made: Sequence[Result], validated: bool = False
) -> dict[str, Any] | None:
    """Tag a run's best checkpoint in MLflow, and register its weights under an alias.

    The alias is `best` for evaluations by the protocol of the run's own recipe (samples, features,
    reference, sampler, guidance, precision …), and `best-validated` for the smaller ones of
    validation. It names the smallest distance among evaluations of one protocol, and never moves to
    another protocol. Weights are exported, so they outlive the checkpoint.

    Args:
        made: the evaluations just made or found.
        validated: they were made by validation during training.

    Returns:
        step, value and file of the best; None if no evaluation followed the recipe's protocol.
    """
    # By the protocol that the run began with.
    protocol = {"evaluate": run.stored_recipe.evaluate}
    run = run.using(run.recipe.model_copy(update=protocol))
    recipe, differences = run.recipe, _differences(run.recipe, made)
    if not differences:
        alias = BEST
    elif validated:
        alias = BEST_VALIDATED
    else:
        say(f"{run.name}@{BEST} stays as it is: {differences}")
        return None
    best, metric = best_result(run, made[-1]), best_metric(recipe)
    summary: dict[str, Any] = {"step": best.step, metric: best.metrics[metric]}
    name = f"{recipe.tracking.experiment}-{run.name}"
    try:
        tracker = Tracker.of(recipe)
        registered = tracker.registered(name, alias)
        if registered and (other := _other_protocol(run, registered, best, alias)):
            say(f"{name}@{alias} stays as it is: {other}")
            return None
        tracker.tag_best(best.mlflow_run_id, best.step, metric, best.metrics[metric], alias)
    except unreachable_errors() as error:
        say(f"could not tag the best checkpoint in MLflow: {first_line(error)}")
        return summary
    if recipe.tracking.register_best:
        current = registered is not None and registered.evaluation_run_id == best.mlflow_run_id
        summary["file"] = None if current else _register(run, best, tracker, alias)
    return summary


def _differences(own: Recipe, made: Sequence[Result]) -> str:
    """How the last evaluation's protocol differs from the run's own; "" if it does not."""
    try:
        mine = evaluated_identity(own)
    except UserError as error:
        return str(error)
    theirs = made[-1].evaluate
    flat, other = flatten(mine), flatten(theirs)
    return "; ".join(
        f"evaluate.{key} is {other.get(key)!r}, in the run's recipe {flat.get(key)!r}"
        for key in sorted(flat.keys() | other.keys())
        if flat.get(key) != other.get(key)
    )


def _other_protocol(run: Run, registered: Registered, best: Result, alias: str) -> str:
    """Why the alias may not move to `best`; "" if it may.

    An alias set by a version that did not know protocols may name an evaluation by another
    protocol than the recipe's; it moves.
    """
    measured = run_results(run)
    held = next((r for r in measured if r.mlflow_run_id == registered.evaluation_run_id), None)
    if held is None or held.same_protocol(best):
        return ""
    if alias == BEST and held.evaluate != best.evaluate:
        return ""
    return (
        f"it was measured at step {held.step:,} by another protocol (samples, features or "
        "reference have changed since); remove the alias in MLflow to begin anew"
    )


def _notes(run: Run, best: Result, metric: str) -> ModelNotes:
    recipe = run.recipe
    model, data, size = recipe.model, recipe.data, recipe.latent_size
    channels = recipe.autoencoder.latent_channels
    made = channels * (2 if recipe.diffusion.learned_variance else 1)
    kind = "pixels" if model.on_pixels else f"{channels}x{size}x{size} latents"
    labels = f"{data.num_classes} classes" if model.conditional else "no labels"
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {
        "x": ("float32", (-1, channels, size, size)),
        "t": ("float32", (-1,)),
    }
    if model.conditional:
        inputs["y"] = ("int64", (-1,))
    sampler, guidance = recipe.evaluate.sampler, recipe.evaluate.guidance
    return ModelNotes(
        model=(
            f"{model.architecture} on {kind} of {data.resolution}x{data.resolution} images of "
            f"{data.name} ({labels}), objective {recipe.diffusion.objective}; run {run.name}. A "
            f"version is a safetensors file under the published names, tag `file`; load it by "
            f"`diffit sample --weights FILE` or `diffit import`."
        ),
        version=(
            f"Step {best.step:,}, weights {recipe.evaluate.weights}: {metric} "
            f"{best.metrics[metric]:.4g} on {best.samples:,} samples, {sampler.name} "
            f"{sampler.steps}, guidance {guidance.title}."
        ),
        inputs=inputs,
        outputs={"output": ("float32", (-1, made, size, size))},
    )


def _register(run: Run, best: Result, tracker: Tracker, alias: str) -> str | None:
    """Export and register the best weights; their file if they are registered."""
    from diffit_train.runs import import_export

    recipe = run.recipe
    name = f"{recipe.tracking.experiment}-{run.name}"
    metric, weights = best_metric(recipe), recipe.evaluate.weights
    shown = f"step {best.step:,}, {metric} {best.metrics[metric]:.4g}"
    if best.step not in run.checkpoints:
        say(f"best so far: {shown}; not registered: its checkpoint was deleted")
        return None
    width = recipe.evaluate.reconstructed
    try:
        if width is None:
            file = import_export.export_weights(run, best.step, weights)
        else:
            file = reconstructed_url(run.url, width, best.step)
        tags = {"step": best.step, metric: best.metrics[metric], "weights": weights}
        about = _notes(run, best, metric)
        tracker.register(name, file, best.mlflow_run_id, tags, about, alias)
    except unreachable_errors() as error:
        say(f"best so far: {shown}; not registered: {first_line(error)}")
        return None
    say(
        f"best so far: {shown}; registered {storage.display_path(file)} in MLflow as {name}@{alias}"
    )
    return file
