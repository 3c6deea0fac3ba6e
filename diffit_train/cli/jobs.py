"""`diffit jobs`: list, follow and stop the jobs that `diffit submit` sent to a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train.cli.options import Json, print_result
from diffit_train.errors import UserError
from diffit_train.jobs.client import LIVE, STOP_WAIT_S, connect, find_jobs, list_jobs
from diffit_train.jobs.fleet import follow_jobs, require_success
from diffit_train.progress import print_rows, say

JobServer = Annotated[
    str, typer.Option("--address", help="Ray job server.", envvar="RAY_API_SERVER_ADDRESS")
]
JobName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="As `diffit jobs list` shows it, or STAGE-RUN; `*` stands for anything.",
        show_default=False,
    ),
]
LOCAL_SERVER = "http://127.0.0.1:8265"


def jobs_list_command(address: JobServer = LOCAL_SERVER, as_json: Json = False) -> None:
    """List the jobs that `diffit submit` sent: run, stage, state, age and last progress.

    Example: `diffit jobs list --address http://head:8265`
    """
    rows = list_jobs(connect(address))
    if as_json:
        print_result(rows, as_json)
    elif rows:
        print_rows(f"jobs at {address}", rows)
    else:
        say(f"{address} has no job that `diffit submit` sent")


def jobs_follow_command(name: JobName, address: JobServer = LOCAL_SERVER) -> None:
    """Follow a job's log until it ends; exit status 0, 1 if it failed, 2 for bad input.

    Example: `diffit jobs follow train-imagenet256 --address http://head:8265`
    """
    for state in follow_jobs(address, find_jobs(connect(address), name)):
        require_success(state)


def jobs_stop_command(
    name: JobName, address: JobServer = LOCAL_SERVER, as_json: Json = False
) -> None:
    """Let jobs save their work and stop, and wait until they have.

    Example: `diffit jobs stop train-imagenet256 --address http://head:8265`
    """
    client = connect(address)
    infos = find_jobs(client, name)
    live = [info for info in infos if info.status in LIVE]
    if not live:
        ended = ", ".join(f"{info.submission_id} ({str(info.status).lower()})" for info in infos)
        raise UserError(f"no job to stop: not running: {ended}")
    for info in live:
        client.stop_job(info.submission_id)
        say(f"asked job {info.submission_id} to save and stop; Ray kills it after {STOP_WAIT_S} s")
    states = follow_jobs(address, live)
    say("submit again to resume")
    print_result([{"name": s.submission_id, "state": s.state} for s in states], as_json)
