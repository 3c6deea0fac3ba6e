"""A cluster's job server: connect, list, send, stop."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import diffit_train
from diffit_train.config import dump_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.forwarded_env import write_forwarded
from diffit_train.ray_jobs.job import Job

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

LIVE = ("PENDING", "RUNNING")
BAD_INPUT = 2
READY_S = 60.0
# For how long a job that is asked to stop may save its work before Ray kills it; Ray's own default
# is 3 s.
STOP_WAIT_S = 900
TOKEN_FILE = Path.home() / ".ray" / "auth_token"


def job_attempts(client: JobSubmissionClient) -> dict[str, list[JobDetails]]:
    """All attempts of our jobs on the cluster, in order, by job name."""
    found: dict[str, list[JobDetails]] = {}
    for info in client.list_jobs():
        metadata = info.metadata or {}
        if "diffit.name" in metadata:
            found.setdefault(metadata["diffit.name"], []).append(info)
    for infos in found.values():
        infos.sort(key=lambda info: int(info.metadata.get("diffit.attempt", 0)))
    return found


def cancel_jobs(names: Sequence[str], address: str) -> int:
    """Stop those of the named jobs that are on the cluster; returns how many."""
    client = connect(address)
    attempts, stopped = job_attempts(client), 0
    for name in names:
        for info in attempts.get(name, []):
            if info.status in LIVE:
                client.stop_job(info.submission_id)
                stopped += 1
    return stopped


def failure_reason(info: JobDetails | None) -> str:
    """Why a job ended, in one line."""
    message = str(getattr(info, "message", None) or "no reason given")
    return message.splitlines()[0].partition(", last available")[0]


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server.

    Raises:
        UserError: the address is malformed, unreachable, or requires a token.
    """
    # A cluster started on a machine with this file requires its token; clients send it only in
    # this mode.
    if TOKEN_FILE.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # Ray logs every upload.
    logging.getLogger("ray").setLevel(logging.WARNING)
    if urlsplit(address).scheme not in ("http", "https"):
        raise UserError(f"--address is {address!r}, but must look like http://head:8265")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"{address} requires a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
            "cluster's token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"could not reach a Ray job server at {address}; start one with `ray start --head`, or "
            "fix --address"
        ) from error


def send_job(
    client: JobSubmissionClient, job: Job, address: str, python: str | None, attempt: int
) -> str:
    """Submit an attempt of a job; its submission id.

    Raises:
        UserError: a variable to forward is not set.
        DiffitError: the cluster refused it.
    """
    submission_id = f"{job.name}-{attempt}"
    folder = Path(tempfile.mkdtemp(prefix="diffit-submit-"))
    request = {
        "entrypoint": job.entrypoint(python or _python(address)),
        "submission_id": submission_id,
        "metadata": {**job.metadata(), "diffit.attempt": str(attempt)},
        "runtime_env": {
            "working_dir": str(folder),
            "env_vars": {
                "DIFFIT_SUBMISSION_ID": submission_id,
                "PYTHONUNBUFFERED": "1",
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            },
        },
    }
    try:
        _stage_files(job, folder)
        _send_when_ready(client, request)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DiffitError(f"the cluster refused job {submission_id}: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return submission_id


def _send_when_ready(client: JobSubmissionClient, request: dict[str, Any]) -> None:
    """Submit, retrying while a cluster that has just started has no agents yet."""
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            client.submit_job(**request)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline_s:
                raise DiffitError(
                    f"no node of the cluster accepts jobs after {READY_S:g} s: the head node's "
                    "dashboard agent is not running, or its port is in use (52365, or that of `ray "
                    "start --dashboard-agent-listen-port`)"
                ) from error
            time.sleep(1.0)


def _stage_files(job: Job, folder: Path) -> None:
    """Fill the job's working directory: its entry point, the recipe, and this package."""
    package = Path(diffit_train.__file__).parent
    pipelines = package / "pipelines"
    if not pipelines.is_dir():
        pipelines = package.parent / "pipelines"
    shutil.copy(pipelines / f"{job.stage}.py", folder)
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "recipe.yaml").write_text(dump_recipe(job.recipe))
    write_forwarded(folder, job.env)


def _python(address: str) -> str:
    local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    return sys.executable if local else "python"
