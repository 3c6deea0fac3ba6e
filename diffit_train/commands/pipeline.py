"""`diffit pipeline`: encode, references, train and evaluate, one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffit_train.commands.encode import encode_latents
from diffit_train.commands.options import (
    Address,
    InitFrom,
    InitWeights,
    Json,
    Overrides,
    RecipeName,
    Root,
    RunName,
    Steps,
    print_result,
    read_known_recipe,
)
from diffit_train.commands.train import train_run
from diffit_train.config import Recipe
from diffit_train.evaluation.evaluate import compute_references, evaluate_run
from diffit_train.jobs.job import STAGE_LINE
from diffit_train.progress import say
from diffit_train.runs.start import init_from


def run_pipeline(
    recipe: Recipe, run: str, steps: list[str], address: str | None = None
) -> dict[str, Any]:
    """Run every stage that is not finished; returns the result of each.

    Args:
        steps: checkpoints to evaluate; none for the newest.
        address: of the Ray cluster.
    """
    stages: dict[str, Callable[[], Any]] = {
        "encode": lambda: encode_latents(recipe, address),
        "references": lambda: compute_references(recipe, address),
        "train": lambda: train_run(recipe, run, address),
        "evaluate": lambda: evaluate_run(recipe, run, steps, address),
    }
    results = {}
    for number, (name, stage) in enumerate(stages.items(), start=1):
        say(f"{STAGE_LINE}stage {number} of {len(stages)}, {name}")
        results[name] = stage()
    say(f"{STAGE_LINE}all {len(stages)} stages are done")
    return results


def pipeline_command(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    step: Steps = None,
    init: InitFrom = None,
    init_weights: InitWeights = "ema",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Encode, compute references, train and evaluate; skip what is finished, resume what is not.

    Example: `diffit pipeline imagenet256 --root s3://bucket/project --address auto`
    """
    recipe = read_known_recipe(name, overrides, root)
    recipe = init_from(recipe, run or recipe.name, init, init_weights)
    print_result(run_pipeline(recipe, run or recipe.name, step or [], address), as_json)
