"""`diffit evaluate` and `diffit references`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.evaluations import evaluate_all
from diffit_train.commands.of_run import OptionalRecipe, RunOverrides, recipe_and_run
from diffit_train.commands.options import (
    Address,
    CheckCluster,
    ClusterPython,
    Json,
    Overrides,
    RecipeName,
    Root,
    RunName,
    RuntimeEnvOption,
    Steps,
    print_result,
    read_known_recipe,
)
from diffit_train.commands.sweep import FleetOptions, run_sweep
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.result import finished_result
from diffit_train.progress import say
from diffit_train.runs.checkpoints import committed_steps
from diffit_train.runs.identity import NEWEST, find_checkpoint, run_url
from diffit_train.runs.start import starting_from

# Seconds between checks for new checkpoints.
WATCH_S = 30.0


def evaluate_run(
    recipe: Recipe,
    run: str,
    steps: Sequence[str],
    address: str | None = None,
    sweep: str = "",
    npz: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate checkpoints of a run; one result per checkpoint that `steps` name.

    Args:
        steps: numbers, or `newest`, which is the default.
        sweep: name of the sweep that the evaluations belong to.
        npz: write the images in ADM's format as samples.npz next to each result.
    """
    recipe = starting_from(recipe, run)
    wanted = dict.fromkeys(find_checkpoint(recipe, run, text)[1] for text in steps or (NEWEST,))
    return evaluate_all([(recipe, step) for step in wanted], run, address, sweep, npz)


def watch_run(
    recipe: Recipe,
    run: str,
    address: str | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """Evaluate each checkpoint of a run as it appears, up to its last step.

    Checkpoints that training removes in the meantime are skipped.

    Args:
        pause: sleeps for a number of seconds between checks.
    """
    recipe = starting_from(recipe, run)
    find_checkpoint(recipe, run, NEWEST)
    url, waiting = run_url(recipe, run), False
    found: dict[int, dict[str, Any]] = {}
    while True:
        steps = committed_steps(url)
        missing = [s for s in steps if s not in found]
        for step in missing:
            if finished_result(recipe, run, step) is None:
                say(f"evaluating the checkpoint of step {step:,}")
            try:
                (found[step],) = evaluate_all([(recipe, step)], run, address, "", npz=False)
            except DiffitError as error:
                if step in committed_steps(url):
                    raise
                say(f"the checkpoint of step {step:,} was removed during its evaluation: {error}")
        if steps and steps[-1] >= recipe.train.steps:
            return [found[step] for step in sorted(found)]
        if not missing and not waiting:
            waiting = True
            say(f"waiting for new checkpoints in {storage.display_path(url)}")
        pause(WATCH_S)


def compute_references(recipe: Recipe, address: str | None = None) -> dict[str, Any]:
    """Compute the statistics of the recipe's real images unless they exist; summarize them."""
    from diffit_train.evaluation import runner

    url, reference = runner.make_reference(recipe, address)
    kept = 0 if reference.features is None else len(reference.features)
    count = "" if reference.count is None else f" over {reference.count:,} images"
    say(
        f"reference {storage.display_path(url)}: {len(reference.pool.mean):,} features{count}; "
        f"{kept:,} images kept for precision and recall"
    )
    return {
        "reference": url,
        "images": reference.count,
        "features": len(reference.pool.mean),
        "kept": kept,
    }


def evaluate_command(
    name: OptionalRecipe = None,
    overrides: RunOverrides = None,
    root: Root = None,
    run: RunName = None,
    step: Steps = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, e.g. 10.0.0.1:6379 or auto; with --fleet or --pool, its job server, "
            "e.g. http://head:8265. Default: this machine."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            help="KEY=VALUES, e.g. guidance.scale=1.0:5.0:0.4 or sampler.steps=50,250. Repeat it "
            "to evaluate all combinations.",
        ),
    ] = None,
    sweep_name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the sweep. Default: derived from its keys."),
    ] = None,
    fleet: Annotated[
        bool,
        typer.Option("--fleet", metavar="", help="Submit each evaluation as a separate Ray job."),
    ] = False,
    pool: Annotated[
        bool,
        typer.Option(
            "--pool",
            metavar="",
            help="Submit the sweep as one Ray job: its actors load weights, features and reference "
            "once, and take the chunks of all evaluations from one queue.",
        ),
    ] = False,
    at_most: Annotated[
        int, typer.Option(min=1, help="Maximum number of concurrent fleet jobs.")
    ] = 4,
    retries: Annotated[
        int, typer.Option(min=0, help="Retries of a failed job of --fleet or --pool.")
    ] = 2,
    python: ClusterPython = None,
    runtime_env: RuntimeEnvOption = "auto",
    check: CheckCluster = True,
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
    conformance: Annotated[
        str | None,
        typer.Option(
            help="Folder with the published weights, reference and sample batch: compute their "
            "metrics and compare them with the expected ones. Here precision and recall round like "
            "ADM's evaluator (float16 distances); all other evaluations are exact."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate images from checkpoints of a run and compute their metrics.

    With --sweep, evaluate every combination of the given values and write a table and a plot.
    Rerun the same command to resume.

    Example: `diffit evaluate --run demo --root my-project --step 0 --step newest`

    Example: `diffit evaluate --run imagenet256 --root s3://bucket/project --step newest
    --sweep guidance.scale=1.0:5.0:0.4 --fleet --address http://head:8265`
    """
    if conformance is not None:
        from diffit_train.evaluation.conformance import conform

        print_result(conform(storage.absolute(conformance)), as_json)
        return
    by_jobs = fleet or pool
    if watch and (sweep or step or by_jobs):
        raise UserError(
            "--watch evaluates every checkpoint; remove --step, --sweep, --fleet and --pool"
        )
    if fleet and pool:
        raise UserError("--fleet is a job for each evaluation, --pool one for all; remove one")
    if by_jobs and (not sweep or address is None):
        option = "--fleet" if fleet else "--pool"
        raise UserError(
            f"{option} needs --sweep and the address of a job server, for example --address "
            "http://head:8265"
        )
    if sweep and npz:
        raise UserError("--npz is for single evaluations; remove --npz or --sweep")
    recipe, run = recipe_and_run("evaluate", name, overrides, root, run)
    if watch:
        print_result(watch_run(recipe, run, address), as_json)
    elif sweep:
        jobs = None
        if by_jobs and address:
            jobs = FleetOptions(address, pool, at_most, retries, python, runtime_env, check)
        cluster = None if by_jobs else address
        found = run_sweep(recipe, run, step or [], sweep, sweep_name, cluster, jobs)
        print_result(found, as_json)
    else:
        results = evaluate_run(recipe, run, step or [], address, sweep_member, npz)
        print_result(results, as_json)


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
    print_result(compute_references(read_known_recipe(name, overrides, root), address), as_json)
