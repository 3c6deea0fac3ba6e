"""`diffit train`, with validation during training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.options import (
    Address,
    InitFrom,
    InitWeights,
    Json,
    Overrides,
    RecipeName,
    Root,
    RunName,
    print_result,
    read_known_recipe,
)
from diffit_train.config import Recipe
from diffit_train.config.evaluate import OWN
from diffit_train.evaluation.best import register_best
from diffit_train.progress import say
from diffit_train.redaction import first_line
from diffit_train.runs.run import open_run
from diffit_train.tracking import unreachable_errors
from diffit_train.training.log import send_unsent

if TYPE_CHECKING:
    from diffit_train.evaluation.training_samples import TrainingSamples


def train_run(
    recipe: Recipe,
    run: str,
    address: str | None = None,
    init: str | None = None,
    init_weights: str = "ema",
    *,
    wait: bool = False,
    local: bool = False,
) -> dict[str, Any]:
    """Train a run; return its name, folder and last step.

    Args:
        init: RUN or RUN@STEP to start a new run from.
        init_weights: its weights: raw, or the name of an EMA.
        wait: whether to wait for another command that trains the run.
        local: train in this process, without Ray.
    """
    trained = open_run(recipe, run, init, init_weights)
    recipe, step = trained.recipe, trained.finished_step
    if step is None:
        say(f"Training {storage.display_path(trained.url)}")
        from diffit_train.training import driver

        validate, samples = _validation(recipe, run), _samples(recipe, run)
        step = driver.train(trained, address, validate, samples=samples, wait=wait, local=local)
    else:
        say("already trained" + (f" to step {step:,}" if step > recipe.train.steps else ""))
        send_unsent(trained)
        _send_samples(recipe, run)
    say(f"run {storage.display_path(trained.url)} is at step {step:,}")
    return {"run": run, "url": trained.url, "step": step}


def _samples(recipe: Recipe, run: str) -> TrainingSamples | None:
    """What draws grids during training; None if the recipe has none."""
    if recipe.train.sample_every is None:
        return None
    from diffit_train.evaluation.training_samples import TrainingSamples

    return TrainingSamples(recipe, run)


def _send_samples(recipe: Recipe, run: str) -> None:
    """Log the grids that MLflow lacked when training ended."""
    samples = _samples(recipe, run)
    if samples is not None:
        try:
            samples.send_unsent()
        except unreachable_errors() as error:
            say(f"Could not log samples to MLflow; they are kept: {first_line(error)}")


def _validation(recipe: Recipe, run: str) -> Callable[[int], str] | None:
    """The function that evaluates checkpoints during training; None if the recipe has none."""
    if recipe.train.validate_every is None:
        return None
    from diffit_train.data.sources import list_images
    from diffit_train.evaluation import runner

    changed = {"samples": recipe.train.validate_samples}
    evaluate = recipe.evaluate.model_copy(update=changed)
    recipe = recipe.model_copy(update={"evaluate": evaluate})
    runner.check(recipe)
    if recipe.evaluate.reference == OWN:
        list_images(recipe)
    return functools.partial(validate_checkpoint, recipe, run)


def validate_checkpoint(recipe: Recipe, run: str, step: int) -> str:
    """Evaluate a checkpoint during training; return a line with its metrics."""
    from diffit_train.evaluation import runner

    request = runner.Request(recipe, run, step, curve="validation")
    result = request.finished or runner.evaluate([request])[0]
    register_best(recipe, run, [result], validated=True)
    metrics = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    return f"step {step:,} evaluated: {metrics}  {storage.display_path(result.grid)}"


def train_command(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    init: InitFrom = None,
    init_weights: InitWeights = "ema",
    wait: Annotated[
        bool, typer.Option("--wait", help="If another command trains this run, wait for it.")
    ] = False,
    local: Annotated[
        bool,
        typer.Option("--local", help="Train in this process without Ray, for a debugger."),
    ] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Train on the latents, resuming from the newest checkpoint if there is one.

    Rerun the same command to resume a run, or with a larger train.steps to extend it. On SIGTERM,
    the run saves a checkpoint and exits. It begins by saying where MLflow shows the run's curves.

    Example: `diffit train demo --root my-project --run first train.lr=1e-3`

    Example: `diffit train imagenet512 --root s3://bucket/project --init-from imagenet256@400000`
    """
    recipe = read_known_recipe(name, overrides, root)
    result = train_run(
        recipe, run or recipe.name, address, init, init_weights, wait=wait, local=local
    )
    print_result(result, as_json)
