"""`diffit jobs`: list, follow and stop the jobs that `diffit submit` sent to a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train.commands.options import Json, print_result
from diffit_train.progress import print_rows, say
from diffit_train.ray_jobs.client import connect
from diffit_train.ray_jobs.follow import follow_job, require_success
from diffit_train.ray_jobs.listing import find_job, list_jobs, stop_job

JobServer = Annotated[
    str, typer.Option("--address", help="Ray job server.", envvar="RAY_API_SERVER_ADDRESS")
]
JobName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="As `diffit jobs list` shows it, or STAGE-RUN.", show_default=False
    ),
]
LOCAL_SERVER = "http://127.0.0.1:8265"


def jobs_list_command(address: JobServer = LOCAL_SERVER, as_json: Json = False) -> None:
    """List the jobs that `diffit submit` sent: run, stage, state, age and last progress.

    Example: `diffit jobs list --address http://head:8265`
    """
    rows = [row.as_json() for row in list_jobs(address)]
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
    client = connect(address)
    require_success(follow_job(client, str(find_job(client, name).submission_id)))


def jobs_stop_command(
    name: JobName, address: JobServer = LOCAL_SERVER, as_json: Json = False
) -> None:
    """Let a job save its work and stop, and wait until it has.

    Example: `diffit jobs stop train-imagenet256 --address http://head:8265`
    """
    ended = stop_job(address, name)
    print_result({"name": ended.submission_id, "state": str(ended.status).lower()}, as_json)
