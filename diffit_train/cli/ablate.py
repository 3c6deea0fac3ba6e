"""`diffit ablate`: a table of the paper, trained and evaluated row by row."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.cli.options import (
    Address,
    CheckCluster,
    ClusterPython,
    Json,
    MaxConcurrent,
    Overrides,
    Retries,
    Root,
    RuntimeEnvOption,
    print_result,
)
from diffit_train.cli.pipeline import run_pipeline
from diffit_train.cli.sweep import FleetOptions, run_fleet
from diffit_train.config import Recipe
from diffit_train.config.ablations import SCALES, Ablation, ablation_names, find_ablation
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.best import best_metric
from diffit_train.evaluation.result import Evaluation, Result
from diffit_train.jobs.job import Job
from diffit_train.progress import print_rows, say
from diffit_train.reports.plots import draw_ablation
from diffit_train.runs.run import Run, open_run

SEEN, NOT_SEEN, WITHIN = "seen", "not seen", "within the spread over seeds"


def run_ablation(
    ablation: Ablation,
    scale: str,
    seeds: int,
    overrides: Sequence[str] = (),
    root: str | None = None,
    address: str | None = None,
    fleet: FleetOptions | None = None,
    run_one: Callable[[Run, str | None], float] | None = None,
) -> dict[str, Any]:
    """Train and evaluate every row with every seed; finished runs are kept, killed ones resumed.

    Args:
        overrides: of every row's recipe.
        fleet: first run every row as a Ray job; None to run them here, one after another.
        run_one: from run and address to the distance; None for the whole pipeline.

    Returns:
        The rows with mean and spread, and whether the paper's order was seen.
    """
    # All rows are checked before anything runs.
    members = [
        (
            row,
            open_run(
                ablation.recipe_of(row, scale, seed, overrides, root),
                ablation.run_of(row, scale, seed),
            ),
        )
        for seed in range(seeds)
        for row in ablation.rows
    ]
    recipe = members[0][1].recipe
    if fleet is not None:
        jobs = [Job("pipeline", run) for _, run in members]
        run_as_jobs(ablation.name, jobs, ablation.trains, fleet)
    distances: dict[str, list[float]] = {row: [] for row in ablation.rows}
    for number, (row, run) in enumerate(members, start=1):
        say(f"{ablation.name}: run {number} of {len(members)}, {run.name}")
        distances[row].append((run_one or _distance)(run.refresh(), address))
    result = {
        "ablation": ablation.name,
        "title": ablation.title,
        "scale": scale,
        "seeds": seeds,
        "metric": best_metric(recipe),
        "rows": [_summary(name, ablation, values) for name, values in distances.items()],
        "order": paper_order(ablation, distances),
    }
    out = storage.join(recipe.storage.root, "ablations", f"{ablation.name}-{scale}")
    storage.write_json(f"{out}.json", result)
    with storage.atomic_file(f"{out}.png") as path, path.open("wb") as file:
        draw_ablation(result, file)
    say(f"wrote {storage.display_path(f'{out}.png')}")
    return result


def run_as_jobs(name: str, jobs: list[Job], parallel: bool, fleet: FleetOptions) -> None:
    """Run pipelines as Ray jobs, several at a time, until each is done.

    The first one runs alone, as all share its latents and reference.

    Args:
        parallel: whether the runs are different ones.

    Raises:
        DiffitError: some failed for good; the others are kept.
    """
    _fit_classifier(jobs[0].run.recipe)
    waiting = [job for job in jobs if not _is_done(job)]
    batches = [waiting[:1], waiting[1:]] if parallel else [[job] for job in waiting]
    states = [
        state
        for batch in batches
        if batch
        for state in run_fleet(
            f"ablation {name}",
            batch,
            fleet,
            _is_done,
            lambda job, s: {"run": job.run.name, "state": s.state, "job": s.submission_id},
        )
    ]
    failed = [state for state in states if state.state != "done"]
    if failed:
        reasons = "; ".join(f"{state.name} {state.reason}" for state in failed[:3])
        raise DiffitError(
            f"{len(failed)} of {len(jobs)} runs did not finish: {reasons}; rerun the same command "
            "to retry them"
        )


def _fit_classifier(recipe: Recipe) -> None:
    """Fit the recipe's feature network, if it is one to fit."""
    if recipe.evaluate.features.kind == "classifier":
        from diffit_train.evaluation.feature_networks import fit_features

        fit_features(recipe)


def _is_done(job: Job) -> bool:
    """Whether a run is trained to its last step and evaluated."""
    return _finished(job.run.refresh()) is not None


def _finished(run: Run) -> Result | None:
    """The evaluation of a run that is trained to its last step."""
    step = run.finished_step
    return None if step is None else Evaluation(run, step).read()


def _distance(run: Run, address: str | None) -> float:
    """The Frechet distance of a run, after every stage that is not finished."""
    recipe, result = run.recipe, _finished(run)
    if result is None:
        _fit_classifier(recipe)
        (result,) = run_pipeline(recipe, run.name, address=address)[1]
    return result.metrics[best_metric(recipe)]


def _summary(name: str, ablation: Ablation, values: list[float]) -> dict[str, Any]:
    row = ablation.rows[name]
    return {
        "name": name,
        "title": row.title,
        "values": values,
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "paper": row.fid,
    }


def paper_order(ablation: Ablation, distances: dict[str, list[float]]) -> str:
    """Whether the paper's order of the rows shows in the distances, for each seed's.

    Every pair is compared with the standard deviation of its difference: the order is seen if all
    pairs differ by more and in the paper's direction, and not seen if one differs by more in the
    other direction.
    """
    order = ablation.order()
    if len(order) < 2:
        return "the paper gives no order"
    if min(len(distances[name]) for name in order) < 2:
        return "not decided: one seed has no spread"
    verdicts = []
    for better, worse in itertools.combinations(order, 2):
        better_values, worse_values = distances[better], distances[worse]
        difference = statistics.fmean(worse_values) - statistics.fmean(better_values)
        spread = math.hypot(statistics.stdev(worse_values), statistics.stdev(better_values))
        verdicts.append(0 if abs(difference) <= spread else math.copysign(1, difference))
    if min(verdicts) < 0:
        return NOT_SEEN
    return SEEN if min(verdicts) > 0 else WITHIN


def print_ablation(result: dict[str, Any]) -> None:
    """Print the table with the paper's column."""
    seeds = result["seeds"]
    many = "seed" if seeds == 1 else "seeds"
    title = f"{result['ablation']}: {result['title']}; scale {result['scale']}, {seeds} {many}"
    print_rows(
        title,
        [
            {
                "row": row["name"],
                "": row["title"],
                result["metric"]: row["mean"],
                "spread": "-" if row["spread"] is None else f"{row['spread']:.4g}",
                "paper's FID": "-" if row["paper"] is None else f"{row['paper']:.2f}",
            }
            for row in result["rows"]
        ],
    )
    say(f"the paper's order: {result['order']}")


def ablate_command(
    name: Annotated[
        str, typer.Argument(metavar="TABLE", help=f"One of: {', '.join(ablation_names())}.")
    ],
    overrides: Overrides = None,
    scale: Annotated[
        str,
        typer.Option(
            help="tiny, small (both on the data set's own features) or full, the paper's."
        ),
    ] = "tiny",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 3,
    root: Root = None,
    address: Address = None,
    jobs: Annotated[
        str | None,
        typer.Option("--fleet", help="Job server, e.g. http://head:8265: a Ray job for each run."),
    ] = None,
    max_concurrent: MaxConcurrent = 4,
    retries: Retries = 2,
    python: ClusterPython = None,
    runtime_env: RuntimeEnvOption = "auto",
    check: CheckCluster = True,
    as_json: Json = False,
) -> None:
    """Train and evaluate the rows of a table of the paper, next to the paper's own column.

    Rerun the same command to resume it.

    Example: `diffit ablate table6 --scale tiny --seeds 3 --root my-project`
    """
    if scale not in SCALES:
        raise UserError(f"--scale is {scale!r}, but must be one of: {', '.join(SCALES)}")
    fleet = None
    if jobs is not None:
        fleet = FleetOptions(jobs, False, max_concurrent, retries, python, runtime_env, check)
    ablation = find_ablation(name)
    result = run_ablation(ablation, scale, seeds, overrides or (), root, address, fleet)
    print_ablation(result)
    print_result(result, as_json)
