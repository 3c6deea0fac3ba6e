"""`diffit sweep`: many evaluations, here or as Ray jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.cli.options import (
    CheckCluster,
    ClusterPython,
    Json,
    MaxConcurrent,
    OptionalRecipe,
    Retries,
    Root,
    RunName,
    RunOverrides,
    RuntimeEnvOption,
    Steps,
    print_result,
)
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation import sweep as stage
from diffit_train.evaluation.evaluate import evaluate_all
from diffit_train.evaluation.result import Evaluation
from diffit_train.evaluation.sweep import Member, Sweep
from diffit_train.jobs.doctor import checked
from diffit_train.jobs.fleet import Fleet, JobState, submit
from diffit_train.jobs.job import Job, RuntimeEnvChoice
from diffit_train.progress import StatesTable, counted, print_rows, say
from diffit_train.runs.checkpoints import NEWEST
from diffit_train.runs.run import Run
from diffit_train.runs.select import select_run
from diffit_train.tracking import tracking_uri


@dataclass(frozen=True)
class FleetOptions:
    """How the jobs of a sweep run, on the job server at `address`.

    Attributes:
        pool: one job with one set of actors for all evaluations, instead of a job for each.
        max_concurrent: maximum number of jobs at once.
        retries: attempts of a job after the first.
    """

    address: str
    pool: bool = False
    max_concurrent: int = 4
    retries: int = 2
    python: str | None = None
    runtime_env: RuntimeEnvChoice = "auto"
    check: bool = True


def run_sweep(
    run: Run,
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
        DiffitError: some evaluations failed or were stopped; the others are kept.
    """
    root = run.root
    wanted = dict.fromkeys(run.checkpoint(step).step for step in steps or (NEWEST,))
    plan = stage.plan_sweep(run, list(wanted), texts, name)
    stage.open_sweep(plan, root)
    folder = storage.display_path(plan.url(root))
    say(f"sweep {plan.name!r}: {counted(len(plan.members), 'evaluation')} in {folder}")
    failed: list[str] = []
    if fleet is None:
        pairs = [(run.using(m.recipe(run.recipe)), m.step) for m in plan.members]
        evaluate_all(pairs, address, plan.name)
    elif fleet.pool:
        _sweep_by_one_job(plan, run, texts, fleet)
    else:
        failed = _sweep_by_jobs(plan, run, fleet)
    results = stage.results(plan, root)
    outputs: dict[str, str] = {}
    if any(result is not None for result in results):
        outputs = _write_outputs(plan, run)
        print_rows(plan.name, stage.rows(plan, results))
        say(f"{storage.display_path(outputs['csv'])}  {storage.display_path(outputs['plot'])}")
    if failed:
        raise DiffitError(
            f"{len(failed)} of {len(plan.members)} evaluations of sweep {plan.name!r} did not "
            f"finish: {'; '.join(failed[:3])}; rerun the same command to retry them"
        )
    return {"name": plan.name, "rows": stage.rows(plan, results), **outputs}


def _write_outputs(plan: Sweep, run: Run) -> dict[str, str]:
    """Write sweep.csv and sweep.png as `diffit compare` does; return their URLs."""
    from diffit_train.reports.compare import compare_store

    url = plan.url(run.root)
    files = {"csv": storage.join(url, "sweep.csv"), "plot": storage.join(url, "sweep.png")}
    compare_store(
        run.root,
        tracking_uri(run.recipe),
        run.recipe.tracking.experiment,
        files["plot"],
        selection=[f"{run.mlflow_run_id}/{plan.name}"],
        csv=files["csv"],
    )
    return files


def _sweep_by_one_job(plan: Sweep, run: Run, texts: Sequence[str], fleet: FleetOptions) -> None:
    """Run a sweep as one Ray job, and follow it; weights and reference are loaded once."""
    if None not in stage.results(plan, run.root):
        say("already evaluated")
        return
    steps = [str(step) for step in dict.fromkeys(member.step for member in plan.members)]
    job = checked(
        Job("evaluate", run, steps, plan.name, axes=texts),
        fleet.address,
        fleet.python,
        fleet.runtime_env,
        check=fleet.check,
    )
    submit(job, fleet.address, follow=True, python=fleet.python, restarts=fleet.retries)


def _sweep_by_jobs(plan: Sweep, run: Run, fleet: FleetOptions) -> list[str]:
    """Run a sweep's evaluations as Ray jobs; return the reasons of those that failed."""
    todo = [
        Job(
            "evaluate", run.using(member.recipe(run.recipe)), (str(member.step),), plan.name, number
        )
        for number, member in enumerate(plan.members)
    ]

    def is_done(job: Job) -> bool:
        return Evaluation(job.run, plan.members[job.number].step).read() is not None

    states = run_fleet(
        f"sweep {plan.name}",
        todo,
        fleet,
        is_done,
        lambda job, state: _state_row(plan.members[job.number], state),
    )
    return [f"{state.name} {state.reason}" for state in states if state.state != "done"]


def run_fleet(
    title: str,
    jobs: Sequence[Job],
    fleet: FleetOptions,
    is_done: Callable[[Job], bool],
    row: Callable[[Job, JobState], dict[str, str]],
) -> list[JobState]:
    """Run Ray jobs, several at a time, and show a table of their states; finished ones are kept.

    Args:
        row: of the table.
    """
    done = [is_done(job) for job in jobs]
    if not all(done):
        first = jobs[done.index(False)]
        used = checked(first, fleet.address, fleet.python, fleet.runtime_env, check=fleet.check)
        jobs = [replace(job, runtime_env=used.runtime_env) for job in jobs]
    states = [
        JobState(job.name, job, "done" if ready else "waiting")
        for job, ready in zip(jobs, done, strict=True)
    ]
    with StatesTable(title) as table:

        def show(states: list[JobState]) -> None:
            table.show([row(job, state) for job, state in zip(jobs, states, strict=True)])

        Fleet(
            fleet.address,
            states,
            fleet.max_concurrent,
            fleet.retries,
            python=fleet.python,
            show=show,
        ).run()
    return states


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


def sweep_command(
    vary: Annotated[
        list[str],
        typer.Option(
            help="KEY=VALUES, e.g. guidance.scale=1.0:5.0:0.4 or sampler.steps=50,250. Repeat it "
            "to evaluate all combinations.",
            show_default=False,
        ),
    ],
    name: OptionalRecipe = None,
    overrides: RunOverrides = None,
    root: Root = None,
    run: RunName = None,
    step: Steps = None,
    sweep_name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the sweep. Default: derived from its keys."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, e.g. 10.0.0.1:6379 or auto; with --fleet or --pool, its job server, "
            "e.g. http://head:8265. Default: this machine."
        ),
    ] = None,
    fleet: Annotated[
        bool,
        typer.Option("--fleet", metavar="", help="Submit each evaluation as a separate Ray job."),
    ] = False,
    pool: Annotated[
        bool,
        typer.Option("--pool", metavar="", help="Submit the sweep as one Ray job, and follow it."),
    ] = False,
    max_concurrent: MaxConcurrent = 4,
    retries: Retries = 2,
    python: ClusterPython = None,
    runtime_env: RuntimeEnvOption = "auto",
    check: CheckCluster = True,
    as_json: Json = False,
) -> None:
    """Evaluate every combination of the given values; write a table and a plot.

    Rerun the same command to resume; `diffit compare RUN/NAME` shows what is finished, and `diffit
    jobs stop` ends jobs.

    Example: `diffit sweep --vary guidance.scale=1.0:5.0:0.4 --run imagenet256
    --root s3://bucket/project --fleet --address http://head:8265`
    """
    if fleet and pool:
        raise UserError("--fleet is a job for each evaluation, --pool one for all; remove one")
    jobs = None
    if fleet or pool:
        if address is None:
            option = "--fleet" if fleet else "--pool"
            raise UserError(f"{option} needs a job server, for example --address http://head:8265")
        jobs = FleetOptions(address, pool, max_concurrent, retries, python, runtime_env, check)
    chosen = select_run("evaluate", name, overrides, root, run)
    cluster = None if jobs else address
    print_result(run_sweep(chosen, step or [], vary, sweep_name, cluster, jobs), as_json)
