"""`diffit import` and `diffit export`: weights into and out of runs, under published names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe, load_recipe_text, stored_text
from diffit_train.errors import UserError
from diffit_train.models.build import build_model
from diffit_train.models.published import (
    check_published,
    read_weights_and_step,
    recipe_of_file,
    require_finite,
    write_published,
)
from diffit_train.progress import say
from diffit_train.redaction import redact
from diffit_train.runs.checkpoints import (
    STEP_DIGITS,
    State,
    StateName,
    committed_steps,
    read_weights,
    save_whole,
)
from diffit_train.runs.deepspeed import is_deepspeed_checkpoint, read_deepspeed_checkpoint
from diffit_train.runs.identity import check_recipe, create_identity, run_url, stored_recipe
from diffit_train.tracking import Tracker


def recipe_of_weights(
    file: str,
    name: str | None,
    overrides: Sequence[str],
    root: str | None,
    allow_pickle: bool = False,
) -> Recipe:
    """The named recipe, or else the weight file's own.

    Raises:
        UserError: no recipe is named and the file has none, or the file is damaged.
    """
    if name is not None:
        return load_recipe(name, overrides, root)
    found = recipe_of_file(storage.absolute(file), allow_pickle)
    if found is None:
        raise UserError(
            f"{file} does not name its model; name its recipe (`diffit sample RECIPE --weights`, "
            "`diffit import --recipe RECIPE`)"
        )
    text, reference = found
    if text:
        return load_recipe_text(text, reference, overrides, root)
    say(f"{file} has the shapes of recipe {reference}")
    return load_recipe(reference, overrides, root)


def import_file(
    recipe: Recipe, run: str, file: str, step: int | None, allow_pickle: bool
) -> dict[str, Any]:
    """Import a weight file into a run.

    Args:
        step: step of the new checkpoint; None for the file's own.
    """
    file = storage.absolute(file)
    if is_deepspeed_checkpoint(file):
        url, number = import_deepspeed(recipe, run, file, allow_pickle)
        say(
            f"imported {storage.display_path(file)} into run {storage.display_path(url)} at step "
            f"{number:,}; training can resume from it, and its EMAs restart"
        )
    else:
        url, number = import_weights(recipe, run, file, step, allow_pickle)
        say(
            f"imported {storage.display_path(file)} into run {storage.display_path(url)} as the "
            f"EMA of step {number:,}"
        )
    return {"run": run, "url": url, "step": number}


def import_weights(
    recipe: Recipe, run: str, file: str, step: int | None = None, allow_pickle: bool = False
) -> tuple[str, int]:
    """Create a run from a weight file, ready to sample and evaluate; its folder and step.

    Args:
        step: step to store the weights under; None for the step recorded in the file, else 0.

    Raises:
        UserError: the run already exists, the file does not hold the recipe's model, or the step
            cannot be a checkpoint's.
    """
    _require_new(recipe, run)
    tensors, said = read_weights_and_step(file, allow_pickle)
    step = _folder_step(step if step is not None else said, file)
    weights = check_published(build_model(recipe), tensors, file)
    shapes = {name: value.shape for name, value in weights.items()}
    state = {"step": step, "images_seen": 0, "optimizer_steps": 0}
    return _new_run(recipe, run, file, {"ema": weights}, shapes, state), step


def import_deepspeed(recipe: Recipe, run: str, folder: str, allow_pickle: bool) -> tuple[str, int]:
    """Create a run from DeepSpeed's own checkpoint, ready to resume; its folder and step.

    Master weights and Adam's moments are imported. DeepSpeed keeps no EMA, so the recipe's EMAs
    restart from the master weights.

    Raises:
        UserError: the run already exists, or the checkpoint does not hold the recipe's model.
    """
    _require_new(recipe, run)
    if not allow_pickle:
        raise UserError(
            f"{folder} is a DeepSpeed checkpoint made of pickles, which can run arbitrary code "
            "when loaded; if you trust it, pass --allow-pickle"
        )
    found = read_deepspeed_checkpoint(folder)
    shapes = {n: p.shape for n, p in build_model(recipe).named_parameters() if p.requires_grad}
    masters = found.values["master"]
    wrong = [f"missing: {n}" for n in sorted(shapes.keys() - masters.keys())]
    wrong += [f"unexpected: {n}" for n in sorted(masters.keys() - shapes.keys())]
    wrong += [
        f"wrong size: {n} has {masters[n].numel():,} elements, expected {shapes[n].numel():,}"
        for n in sorted(shapes.keys() & masters.keys())
        if masters[n].numel() != shapes[n].numel()
    ]
    if wrong:
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise UserError(
            "\n  ".join([f"{folder} does not hold this recipe's model:", *wrong[:8], *more])
        )
    for kind, parameters in found.values.items():
        require_finite(parameters, f"{kind} in {folder}")
    _folder_step(found.step, folder)
    values = {**found.values, **dict.fromkeys(recipe.train.ema, masters)}
    state = {
        "step": found.step,
        "images_seen": found.step * recipe.train.batch_size,
        "optimizer_steps": found.optimizer_steps,
    }
    return _new_run(recipe, run, folder, values, shapes, state), found.step


def _folder_step(step: int | str, file: str) -> int:
    """The step as a number; none is 0.

    Raises:
        UserError: it is not one, or has more digits than the folder of a checkpoint.
    """
    text = str(step) or "0"
    if not (text.isascii() and text.isdecimal() and len(text) <= STEP_DIGITS):
        raise UserError(
            f"{file} has step {text[:40]!r}, which is not a number from 0 to "
            f"{10**STEP_DIGITS - 1:,}; pass --step"
        )
    return int(text)


def _require_new(recipe: Recipe, run: str) -> None:
    if committed_steps(run_url(recipe, run)):
        raise UserError(
            f"run {run!r} in {recipe.storage.root} already exists; choose another --run"
        )


def _new_run(
    recipe: Recipe,
    run: str,
    file: str,
    values: dict[StateName, dict[str, Tensor]],
    shapes: dict[str, torch.Size],
    counts: dict[str, int],
) -> str:
    """Create identity, MLflow run and checkpoint of a run with imported values."""
    url = run_url(recipe, run)
    known = check_recipe(recipe, run)
    # Before the identity: if MLflow is unavailable, nothing must be written.
    tracker = Tracker.of(recipe)
    identity = known or create_identity(recipe, run)
    tags = {
        "diffit.recipe_hash": identity.recipe_hash,
        "diffit.imported_from": storage.display_path(file),
        "mlflow.source.name": "diffit import",
    }
    mlflow_run_id = tracker.training_run(
        recipe.tracking.experiment, identity.uuid, identity.name, recipe.flat(), tags
    )
    state = State(
        **counts,
        recipe_hash=identity.recipe_hash,
        mlflow_run_id=mlflow_run_id,
        world_size=1,
        zero_stage=0,
    )
    save_whole(values, shapes, url, state)
    tracker.finish(mlflow_run_id)
    return url


def export_weights(recipe: Recipe, run: str, step: int, kind: str, out: str | None = None) -> str:
    """Write a checkpoint's weights to one safetensors file under the published names; its URL.

    Args:
        kind: `raw`, or the name of an EMA.
        out: output file; None for RUN/export/KIND-STEP.safetensors.

    Raises:
        UserError: its weights are NaN or infinite.
        DiffitError: the checkpoint is damaged.
    """
    url = run_url(recipe, run)
    out = out or storage.join(url, "export", f"{kind}-{step:010d}.safetensors")
    weights = read_weights(url, step, kind)
    write_published(build_model(recipe), weights, out, export_metadata(recipe, run, step, kind))
    return out


def export_metadata(recipe: Recipe, run: str, step: int, weights: str) -> dict[str, str]:
    """Metadata of an exported file: the run's own recipe, with the current tracking URI."""
    # A file may be passed on: no root, and no credentials.
    uri = recipe.tracking.uri
    tracking = recipe.tracking.model_copy(update={"uri": uri and redact(uri)})
    own = stored_recipe(run_url(recipe, run)).model_copy(update={"tracking": tracking})
    return {"run": run, "step": str(step), "weights": weights, "recipe": stored_text(own)}
