"""`diffit evaluate` and `diffit references`."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train.api import load_recipe
from diffit_train.cli.options import (
    Address,
    Json,
    OptionalRecipe,
    Overrides,
    RecipeName,
    Root,
    RunName,
    RunOverrides,
    Steps,
    print_result,
)
from diffit_train.errors import UserError
from diffit_train.evaluation.evaluate import compute_references, evaluate_run, watch_run
from diffit_train.runs.select import select_run


def evaluate_command(
    name: OptionalRecipe = None,
    overrides: RunOverrides = None,
    root: Root = None,
    run: RunName = None,
    step: Steps = None,
    address: Address = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", metavar="", help="Evaluate each new checkpoint while training runs."
        ),
    ] = False,
    npz: Annotated[
        bool,
        typer.Option("--npz", metavar="", help="Write samples.npz, readable by ADM's evaluator."),
    ] = False,
    sweep_member: Annotated[
        str, typer.Option("--sweep-member", hidden=True, help="Sweep of this evaluation.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Generate images from checkpoints of a run and compute their metrics.

    Rerun the same command to resume. Many settings: `diffit sweep`.

    Example: `diffit evaluate --run demo --root my-project --step 0 --step newest`
    """
    if watch and step:
        raise UserError("--watch evaluates every checkpoint; remove --step")
    chosen = select_run("evaluate", name, overrides, root, run)
    if watch:
        results = watch_run(chosen, address)
    else:
        results = evaluate_run(chosen, step or [], address, sweep_member, npz)
    print_result([result.model_dump(mode="json") for result in results], as_json)


def references_command(
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Compute the statistics of the real images that evaluations compare against.

    `diffit evaluate` does this itself if they are missing.

    Example: `diffit references imagenet256 --root s3://bucket/project data.source=s3://bucket/train`
    """
    print_result(compute_references(load_recipe(name, overrides or (), root), address), as_json)
