"""`diffit submit`."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train.cli.options import (
    CheckCluster,
    ClusterPython,
    InitFrom,
    InitWeights,
    Json,
    Overrides,
    RecipeName,
    Root,
    RunName,
    RuntimeEnvOption,
    Steps,
    print_result,
    read_recipe,
)
from diffit_train.jobs.doctor import checked
from diffit_train.jobs.fleet import submit
from diffit_train.jobs.job import job
from diffit_train.runs.run import open_run
from diffit_train.runs.select import select_run


def submit_command(
    stage: Annotated[
        str,
        typer.Argument(
            help="Command to submit: encode, train, evaluate or pipeline.", show_default=False
        ),
    ],
    name: RecipeName,
    address: Annotated[
        str, typer.Option(help="Ray job server, e.g. http://head:8265.", show_default=False)
    ],
    overrides: Overrides = None,
    root: Root = None,
    run: RunName = None,
    step: Steps = None,
    init: InitFrom = None,
    init_weights: InitWeights = "ema",
    follow: Annotated[
        bool, typer.Option(metavar="", help="Follow the job's log until it ends.")
    ] = True,
    python: ClusterPython = None,
    runtime_env: RuntimeEnvOption = "auto",
    check: CheckCluster = True,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME",
            help="Environment variable to forward, e.g. AWS_SECRET_ACCESS_KEY; may be repeated. "
            "Default: jobs use what the nodes have.",
        ),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(
            min=0, help="Times to resubmit a failed job while following it, e.g. if its node dies."
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Submit encode, train, evaluate or pipeline to a cluster as a Ray job, and follow its log.

    Before that, a short job checks every node, as `diffit doctor` does; if anything needs fixing,
    nothing is submitted.

    Rerun the same command to follow a running job or resume an ended one.

    Example: `diffit submit train imagenet256 --address http://head:8265 --root s3://bucket/project`
    """
    if stage == "evaluate":
        chosen = select_run("evaluate", name, overrides, root, run)
    else:
        chosen = open_run(read_recipe(name, overrides, root), run, init, init_weights)
    wanted = job(stage, chosen, step or [], env or [])
    wanted = checked(wanted, address, python, runtime_env, check=check)
    submission_id = submit(wanted, address, follow=follow, python=python, restarts=restarts)
    print_result({"submission_id": submission_id, "name": wanted.name}, as_json)
