"""`diffit train`."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train.api import load_recipe, train
from diffit_train.cli.options import (
    Address,
    InitFrom,
    InitWeights,
    Json,
    Overrides,
    RecipeName,
    Root,
    RunName,
    print_result,
)


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
    recipe = load_recipe(name, overrides or (), root)
    trained = train(
        recipe,
        run,
        address=address,
        init_from=init,
        init_weights=init_weights,
        wait=wait,
        local=local,
    )
    step = trained.checkpoints.latest_step
    print_result({"run": trained.name, "url": trained.url, "step": step}, as_json)
