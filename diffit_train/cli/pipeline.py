"""`diffit pipeline`: encode, references, train and evaluate, one after another."""

from __future__ import annotations

from collections.abc import Sequence

from diffit_train.api import (
    Run,
    compute_references,
    encode,
    evaluate,
    load_recipe,
    train,
)
from diffit_train.cli.options import (
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
)
from diffit_train.config import Recipe
from diffit_train.evaluation.result import Result
from diffit_train.jobs.job import STAGE_LINE
from diffit_train.progress import say
from diffit_train.runs.checkpoints import NEWEST
from diffit_train.runs.run import open_run


def run_pipeline(
    recipe: Recipe,
    name: str | None = None,
    steps: Sequence[str] = (),
    address: str | None = None,
) -> tuple[Run, list[Result]]:
    """Run every stage that is not finished; returns the run and its evaluations.

    Args:
        steps: checkpoints to evaluate; none for the newest.
        address: of the Ray cluster.
    """
    say(f"{STAGE_LINE}stage 1 of 4, encode")
    encode(recipe, address=address)
    say(f"{STAGE_LINE}stage 2 of 4, references")
    compute_references(recipe, address)
    say(f"{STAGE_LINE}stage 3 of 4, train")
    run = train(recipe, name, address=address)
    say(f"{STAGE_LINE}stage 4 of 4, evaluate")
    results = evaluate(run, steps or [NEWEST], address=address)
    say(f"{STAGE_LINE}all 4 stages are done")
    return run, results


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
    recipe = load_recipe(name, overrides or (), root)
    chosen = open_run(recipe, run, init, init_weights)  # refused before anything runs
    trained, results = run_pipeline(chosen.recipe, chosen.name, step or (), address)
    evaluated = [result.model_dump(mode="json") for result in results]
    print_result({"run": trained.name, "url": trained.url, "evaluate": evaluated}, as_json)
