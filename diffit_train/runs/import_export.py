"""`diffit import` and `diffit export`: weights into and out of runs, under published names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe, load_recipe, load_recipe_text, stored_text
from diffit_train.errors import UserError, redact
from diffit_train.models.build import build_model
from diffit_train.models.published import (
    check_published,
    read_weights_and_step,
    recipe_of_file,
    require_finite,
    write_published,
)
from diffit_train.progress import say
from diffit_train.runs.checkpoints import (
    STEP_DIGITS,
    Checkpoint,
    State,
    StateName,
    save_whole,
)
from diffit_train.runs.deepspeed import is_deepspeed_checkpoint, read_deepspeed_checkpoint
from diffit_train.runs.run import Run
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
    known = recipe_of_file(storage.absolute(file), allow_pickle)
    if known is None:
        raise UserError(
            f"{file} does not name its model; name its recipe (`diffit sample RECIPE --weights`, "
            "`diffit import --recipe RECIPE`)"
        )
    text, reference = known
    if text:
        return load_recipe_text(text, reference, overrides, root)
    say(f"{file} has the shapes of recipe {reference}")
    return load_recipe(reference, overrides, root)


def import_file(run: Run, file: str, step: int | None, allow_pickle: bool) -> Checkpoint:
    """Create a run from a weight file, or from a folder of DeepSpeed's `save_checkpoint`.

    Args:
        step: step of the new checkpoint; None for the file's own, else 0.

    Raises:
        UserError: the run already exists, the file does not hold the recipe's model, or the step
            cannot be a checkpoint's.
    """
    file = storage.absolute(file)
    if run.checkpoints:
        raise UserError(f"run {run.name!r} in {run.root} already exists; choose another --run")
    deepspeed = is_deepspeed_checkpoint(file)
    load = import_deepspeed if deepspeed else import_weights
    checkpoint = load(run, file, step, allow_pickle)
    what = "at step" if deepspeed else "as the EMA of step"
    resume = "; training can resume from it, and its EMAs restart" if deepspeed else ""
    say(
        f"imported {storage.display_path(file)} into run {storage.display_path(run.url)} {what} "
        f"{checkpoint.step:,}{resume}"
    )
    return checkpoint


def import_weights(run: Run, file: str, step: int | None, allow_pickle: bool) -> Checkpoint:
    """Create a run from a file with the published names, ready to sample and evaluate."""
    tensors, recorded = read_weights_and_step(file, allow_pickle)
    step = _folder_step(step if step is not None else recorded, file)
    weights = check_published(build_model(run.recipe), tensors, file)
    shapes = {name: value.shape for name, value in weights.items()}
    state = {"step": step, "images_seen": 0, "optimizer_steps": 0}
    return _save_imported(run, file, {"ema": weights}, shapes, state)


def import_deepspeed(run: Run, folder: str, step: int | None, allow_pickle: bool) -> Checkpoint:
    """Create a run from DeepSpeed's own checkpoint, ready to resume; its step is its own.

    Master weights and Adam's moments are imported. DeepSpeed keeps no EMA, so the recipe's EMAs
    restart from the master weights.
    """
    if not allow_pickle:
        raise UserError(
            f"{folder} is a DeepSpeed checkpoint made of pickles, which can run arbitrary code "
            "when loaded; if you trust it, pass --allow-pickle"
        )
    recipe, loaded = run.recipe, read_deepspeed_checkpoint(folder)
    shapes = {n: p.shape for n, p in build_model(recipe).named_parameters() if p.requires_grad}
    masters = loaded.values["master"]
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
    for kind, parameters in loaded.values.items():
        require_finite(parameters, f"{kind} in {folder}")
    state = {
        "step": _folder_step(loaded.step, folder),
        "images_seen": loaded.step * recipe.train.batch_size,
        "optimizer_steps": loaded.optimizer_steps,
    }
    values = {**loaded.values, **dict.fromkeys(recipe.train.ema, masters)}
    return _save_imported(run, folder, values, shapes, state)


def _folder_step(step: int | str, file: str) -> int:
    """The step as a number; none is 0.

    Raises:
        UserError: it is not a number, or has more digits than the folder of a checkpoint.
    """
    text = str(step) or "0"
    if not (text.isascii() and text.isdecimal() and len(text) <= STEP_DIGITS):
        raise UserError(
            f"{file} has step {text[:40]!r}, which is not a number from 0 to "
            f"{10**STEP_DIGITS - 1:,}; pass --step"
        )
    return int(text)


def _save_imported(
    run: Run,
    file: str,
    values: dict[StateName, dict[str, Tensor]],
    shapes: dict[str, torch.Size],
    counts: dict[str, int],
) -> Checkpoint:
    """Create metadata, MLflow run and checkpoint of a run with imported values."""
    recipe, known = run.recipe, run.check()
    # Before the metadata: if MLflow is unavailable, nothing must be written.
    tracker = Tracker.of(recipe)
    metadata = known or run.create()
    tags = {
        "diffit.recipe_hash": metadata.recipe_hash,
        "diffit.imported_from": storage.display_path(file),
        "mlflow.source.name": "diffit import",
    }
    mlflow_run_id = tracker.training_run(
        recipe.tracking.experiment, metadata.uuid, run.name, recipe.flat(), tags
    )
    state = State(
        **counts,
        recipe_hash=metadata.recipe_hash,
        mlflow_run_id=mlflow_run_id,
        world_size=1,
        zero_stage=0,
    )
    save_whole(values, shapes, run.url, state)
    tracker.finish(mlflow_run_id)
    return run.refresh().checkpoints[state.step]


def export_weights(run: Run, step: int, weights: str, out: str | None = None) -> str:
    """Write a checkpoint's weights to one safetensors file under the published names; its URL.

    Args:
        weights: `raw`, or the name of an EMA.
        out: output file; None for RUN/export/WEIGHTS-STEP.safetensors.

    Raises:
        UserError: its weights are NaN or infinite.
        DiffitError: the checkpoint is damaged.
    """
    out = out or storage.join(run.url, "export", f"{weights}-{step:010d}.safetensors")
    tensors = run.checkpoints[step].load(weights)
    write_published(build_model(run.recipe), tensors, out, export_metadata(run, step, weights))
    return out


def export_metadata(run: Run, step: int, weights: str) -> dict[str, str]:
    """Metadata of an exported file: the run's own recipe, with the current tracking URI."""
    # A file may be passed on: no root, and no credentials.
    uri = run.recipe.tracking.uri
    tracking = run.recipe.tracking.model_copy(update={"uri": uri and redact(uri)})
    own = run.stored_recipe.model_copy(update={"tracking": tracking})
    return {"run": run.name, "step": str(step), "weights": weights, "recipe": stored_text(own)}
