"""`diffit import` and `diffit export`: weights in and out of a run, under the published names."""

from __future__ import annotations

from diffit_train import storage
from diffit_train.checkpoints import State, committed_steps, read_weights
from diffit_train.config import Recipe, dump_recipe
from diffit_train.errors import UserError
from diffit_train.models.build import build_model
from diffit_train.models.published import check_published, read_weights_file, write_published
from diffit_train.tracking import Tracker
from diffit_train.training.checkpoint import save_weights
from diffit_train.training.run import check_recipe, create_identity, run_url


def import_weights(
    recipe: Recipe, run: str, file: str, step: int = 0, allow_pickle: bool = False
) -> str:
    """Make a run of a weight file, ready to be sampled and evaluated; the run's folder.

    Args:
        step: under which the weights are stored, where the file does not say how long it was
            trained.

    Raises:
        UserError: the run exists already, or the file does not hold the recipe's model.
    """
    url = run_url(recipe, run)
    if committed_steps(url):
        raise UserError(f"run {run!r} in {recipe.storage.root} exists; choose another --run")
    tensors = read_weights_file(file, allow_pickle)
    weights = check_published(build_model(recipe), tensors, file)
    identity = check_recipe(recipe, run) or create_identity(recipe, run)
    tracker = Tracker.of(recipe)
    tags = {
        "diffit.recipe_hash": identity.recipe_hash,
        "diffit.imported_from": storage.shown(file),
        "mlflow.source.name": "diffit import",
    }
    mlflow_run_id = tracker.training_run(
        recipe.tracking.experiment, identity.uuid, identity.name, recipe.flat(), tags
    )
    state = State(
        step=step,
        images_seen=0,
        optimizer_steps=0,
        recipe_hash=identity.recipe_hash,
        mlflow_run_id=mlflow_run_id,
        world_size=1,
        zero_stage=0,
    )
    save_weights(weights, url, state)
    tracker.finish(mlflow_run_id)
    return url


def export_weights(recipe: Recipe, run: str, step: int, kind: str, out: str | None = None) -> str:
    """Write a checkpoint's weights to one safetensors file under the published names; its URL.

    Args:
        kind: `ema` or `raw`.
        out: where to; None for RUN/export/KIND-STEP.safetensors.

    Raises:
        DiffitError: the checkpoint is damaged.
    """
    url = run_url(recipe, run)
    out = out or storage.join(url, "export", f"{kind}-{step:010d}.safetensors")
    weights = read_weights(url, step, "raw" if kind == "raw" else "ema")
    metadata = {"run": run, "step": str(step), "weights": kind, "recipe": dump_recipe(recipe)}
    write_published(build_model(recipe), weights, out, metadata)
    return out
