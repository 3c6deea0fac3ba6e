"""`diffit evaluate --sweep` and `diffit sweep`: many evaluations, here or as Ray jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.evaluations import evaluate_all
from diffit_train.commands.options import Json, ProjectRoot, checked_name, print_result
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation import sweep as stage
from diffit_train.evaluation.result import finished_result
from diffit_train.evaluation.sweep import Member, Sweep
from diffit_train.progress import StatesTable, counted, print_rows, say
from diffit_train.ray_jobs.client import cancel_jobs
from diffit_train.ray_jobs.fleet import FleetPlan, JobState, submit_fleet
from diffit_train.ray_jobs.follow import submit
from diffit_train.ray_jobs.job import Job
from diffit_train.ray_jobs.probe import on_checked_cluster
from diffit_train.runs.checkpoints import read_state
from diffit_train.runs.identity import NEWEST, find_checkpoint, run_url
from diffit_train.runs.start import starting_from
from diffit_train.tracking import tracking_uri


@dataclass(frozen=True)
class FleetOptions:
    """How the jobs of a sweep run, on the job server at `address`.

    Attributes:
        pool: one job with one set of actors for all evaluations, instead of a job for each.
        at_most: maximum number of jobs at once.
        retries: attempts of a job after the first.
    """

    address: str
    pool: bool = False
    at_most: int = 4
    retries: int = 2
    python: str | None = None
    runtime_env: str = "auto"
    check: bool = True


def run_sweep(
    recipe: Recipe,
    run: str,
    steps: Sequence[str],
    texts: Sequence[str],
    name: str | None,
    address: str | None = None,
    fleet: FleetOptions | None = None,
) -> dict[str, Any]:
    """Evaluate every combination of some keys' values; write a table and a plot of them.

    Args:
        texts: one KEY=VALUES per varied key.
        fleet: submit the evaluations as Ray jobs; None runs them from here, with one set of actors
            on the Ray cluster at `address`.

    Raises:
        DiffitError: some evaluations failed, or the sweep was canceled; the others are kept.
    """
    recipe = starting_from(recipe, run)
    wanted = dict.fromkeys(find_checkpoint(recipe, run, text)[1] for text in steps or (NEWEST,))
    plan = stage.plan_sweep(recipe, run, list(wanted), texts, name)
    root = recipe.storage.root
    stage.open_sweep(plan, root)
    folder = storage.display_path(plan.url(root))
    say(f"sweep {plan.name!r}: {counted(len(plan.members), 'evaluation')} in {folder}")
    failed: list[str] = []
    if fleet is None:
        pairs = [(member.recipe(recipe), member.step) for member in plan.members]
        evaluate_all(pairs, run, address, plan.name, npz=False)
    elif fleet.pool:
        _sweep_by_one_job(plan, recipe, texts, fleet)
    else:
        failed = _sweep_by_jobs(plan, recipe, fleet)
    found = stage.results(plan, root)
    outputs: dict[str, str] = {}
    if any(result is not None for result in found):
        outputs = _write_outputs(plan, recipe)
        print_rows(plan.name, stage.rows(plan, found))
        say(f"{storage.display_path(outputs['csv'])}  {storage.display_path(outputs['plot'])}")
    if failed:
        raise DiffitError(
            f"{len(failed)} of {len(plan.members)} evaluations of sweep {plan.name!r} did not "
            f"finish: {'; '.join(failed[:3])}; rerun the same command to retry them"
        )
    return {"name": plan.name, "rows": stage.rows(plan, found), **outputs}


def _write_outputs(plan: Sweep, recipe: Recipe) -> dict[str, str]:
    """Write sweep.csv and sweep.png as `diffit compare` does; return their URLs."""
    from diffit_train.reports.compare import compare_store

    url = plan.url(recipe.storage.root)
    state = read_state(run_url(recipe, plan.run), plan.members[0].step)
    files = {"csv": storage.join(url, "sweep.csv"), "plot": storage.join(url, "sweep.png")}
    compare_store(
        recipe.storage.root,
        tracking_uri(recipe),
        recipe.tracking.experiment,
        files["plot"],
        selection=[f"{state.mlflow_run_id}/{plan.name}"],
        csv=files["csv"],
    )
    return files


def _sweep_by_one_job(
    plan: Sweep, recipe: Recipe, texts: Sequence[str], fleet: FleetOptions
) -> None:
    """Run a sweep as one Ray job, and follow it; weights and reference are loaded once."""
    if None not in stage.results(plan, recipe.storage.root):
        say("already evaluated")
        return
    steps = [str(step) for step in dict.fromkeys(member.step for member in plan.members)]
    job = on_checked_cluster(
        Job("evaluate", recipe, plan.run, steps, plan.name, axes=texts),
        fleet.address,
        fleet.python,
        fleet.runtime_env,
        check=fleet.check,
    )
    submit(job, fleet.address, follow=True, python=fleet.python, restarts=fleet.retries)


def _sweep_by_jobs(plan: Sweep, recipe: Recipe, fleet: FleetOptions) -> list[str]:
    """Run a sweep's evaluations as Ray jobs; return the reasons of those that failed."""
    members = list(enumerate(plan.members))
    every = {number: member.recipe(recipe) for number, member in members}
    todo = [Job("evaluate", every[n], plan.run, (str(m.step),), plan.name, n) for n, m in members]

    def is_done(job: Job) -> bool:
        return finished_result(job.recipe, plan.run, plan.members[job.number].step) is not None

    states = run_fleet(
        f"sweep {plan.name}",
        todo,
        fleet,
        is_done,
        lambda state: _state_row(plan.members[state.job.number], state),
        lambda: stage.is_cancelled(plan.url(recipe.storage.root)),
    )
    return [
        state.reason or f"{state.job.name} was canceled"
        for state in states
        if state.state != "done"
    ]


def run_fleet(
    title: str,
    jobs: Sequence[Job],
    fleet: FleetOptions,
    is_done: Callable[[Job], bool],
    row: Callable[[JobState], dict[str, str]],
    is_cancelled: Callable[[], bool] = lambda: False,
) -> list[JobState]:
    """Run Ray jobs, several at a time, and show a table of their states; finished ones are kept.

    Args:
        row: of the table.
    """
    todo = [job for job in jobs if not is_done(job)]
    if todo:
        checked = on_checked_cluster(
            todo[0], fleet.address, fleet.python, fleet.runtime_env, check=fleet.check
        )
        jobs = [replace(job, runtime_env=checked.runtime_env) for job in jobs]
    with StatesTable(title) as table:

        def show(states: list[JobState]) -> None:
            table.show([row(state) for state in states])

        plan = FleetPlan(fleet.at_most, fleet.retries, is_done, is_cancelled, show, fleet.python)
        return submit_fleet(jobs, fleet.address, plan)


def _state_row(member: Member, state: JobState) -> dict[str, str]:
    begun, ended = state.begun_s, state.ended_s
    seconds = (ended or time.monotonic()) - begun if begun else 0.0
    changes = {key.removeprefix("evaluate."): str(v) for key, v in member.changes.items()}
    return {
        "step": f"{member.step:,}",
        **changes,
        "state": state.state,
        "s": f"{seconds:.0f}" if begun else "",
        "failures": str(state.failures or ""),
        "job": state.submission_id,
    }


def show_sweep(root: str, run: str, name: str) -> dict[str, Any]:
    """Print the results of a sweep so far."""
    root = storage.absolute(root)
    plan = stage.read_sweep(stage.sweep_url(root, run, name))
    found = stage.results(plan, root)
    done = sum(result is not None for result in found)
    state = ", canceled" if stage.is_cancelled(plan.url(root)) else ""
    say(f"sweep {name!r}: {done} of {len(found)} evaluations done{state}")
    table = stage.rows(plan, found)
    if table:
        print_rows(name, table)
    return {"name": name, "done": done, "members": len(found), "rows": table}


def stop_sweep(root: str, run: str, name: str, address: str) -> dict[str, Any]:
    """Stop the jobs of a sweep; finished evaluations are kept."""
    root = storage.absolute(root)
    plan = stage.read_sweep(stage.sweep_url(root, run, name))
    recipe = plan.loaded(root)
    jobs = [Job("evaluate", recipe, run, (), name, number) for number in range(len(plan.members))]
    pool = Job("evaluate", recipe, run, (), name, axes=("all",))
    names = [job.name for job in (*jobs, pool)]
    stage.cancel_sweep(plan.url(root))
    stopped = cancel_jobs(names, address)
    say(f"sweep {name!r} canceled; {counted(stopped, 'job')} stopped")
    return {"name": name, "stopped": stopped}


SweepName = Annotated[
    str, typer.Argument(metavar="NAME", callback=checked_name, help="Name of the sweep.")
]
SweepRun = Annotated[str, typer.Option("--run", callback=checked_name, help="Name of the run.")]


def sweep_show_command(
    sweep: SweepName,
    run: SweepRun,
    root: ProjectRoot = ".",
    as_json: Json = False,
) -> None:
    """Print the results of a sweep so far.

    Example: `diffit sweep show guidance.scale --root my-project --run demo`
    """
    print_result(show_sweep(root, run, sweep), as_json)


def sweep_cancel_command(
    sweep: SweepName,
    run: SweepRun,
    address: Annotated[str, typer.Option(help="Ray job server, e.g. http://head:8265.")],
    root: ProjectRoot = ".",
    as_json: Json = False,
) -> None:
    """Stop the jobs of a sweep; rerun `diffit evaluate` to resume it.

    Example: `diffit sweep cancel guidance.scale --root my-project --run demo
    --address http://head:8265`
    """
    print_result(stop_sweep(root, run, sweep, address), as_json)
