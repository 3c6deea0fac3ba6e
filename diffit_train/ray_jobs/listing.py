"""The jobs of ours on a cluster: which there are, how far they are, and stopping them in order."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.ray_jobs.client import LIVE, STOP_WAIT_S, connect, job_attempts
from diffit_train.ray_jobs.follow import follow_job
from diffit_train.ray_jobs.job import STAGE_LINE

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient


@dataclass(frozen=True)
class JobRow:
    """The newest attempt of a job.

    Attributes:
        name: its submission id, by which it is followed and stopped.
        age: since it was submitted.
        progress: the last line of its log, and the stage of a pipeline.
    """

    name: str
    stage: str
    run: str
    state: str
    age: str
    root: str
    progress: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def list_jobs(address: str) -> list[JobRow]:
    """Our jobs on a cluster, newest first.

    Raises:
        UserError: the job server is unreachable.
    """
    client = connect(address)
    newest = [attempts[-1] for attempts in job_attempts(client).values()]
    newest = [info for info in newest if info.metadata.get("diffit.stage") != "doctor"]
    newest.sort(key=lambda info: -(info.start_time or 0))
    return [_row(client, info) for info in newest]


def _row(client: JobSubmissionClient, info: JobDetails) -> JobRow:
    metadata = info.metadata
    age_s = time.time() - (info.start_time or 0) / 1000.0
    return JobRow(
        name=str(info.submission_id),
        stage=metadata.get("diffit.stage", ""),
        run=metadata.get("diffit.run", ""),
        state=str(info.status).lower(),
        age=str(timedelta(seconds=round(age_s))),
        root=metadata.get("diffit.root", ""),
        progress=_log_progress(client.get_job_logs(str(info.submission_id))),
    )


def _log_progress(log: str) -> str:
    """The last line of a log, after the stage that a pipeline is in."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    stages = [line for line in lines if line.startswith(STAGE_LINE)]
    last = [line for line in lines[-1:] if line not in stages]
    return "; ".join([*(line.removeprefix(STAGE_LINE) for line in stages[-1:]), *last])


def find_job(client: JobSubmissionClient, name: str) -> JobDetails:
    """The newest job by its submission id, its name, or STAGE-RUN.

    Raises:
        UserError: there is none, or there are several.
    """
    found = {}
    for job_name, attempts in job_attempts(client).items():
        for info in attempts:
            titles = (info.submission_id, job_name, info.metadata.get("diffit.title"))
            if name in titles:
                found[job_name] = info
    if not found:
        known = ", ".join(sorted(a[-1].submission_id for a in job_attempts(client).values()))
        raise UserError(f"no job is named {name!r}; the cluster has: {known or 'none'}")
    if len(found) > 1:
        choices = ", ".join(sorted(str(info.submission_id) for info in found.values()))
        raise UserError(f"{name!r} names jobs of several roots: {choices}; choose one")
    return next(iter(found.values()))


def stop_job(address: str, name: str) -> JobDetails:
    """Ask a job to save and leave, and follow it until it has; returns how it ended.

    Raises:
        UserError: no such job, or it is not running.
    """
    client = connect(address)
    info = find_job(client, name)
    if info.status not in LIVE:
        raise UserError(f"job {info.submission_id} is not running: {str(info.status).lower()}")
    client.stop_job(info.submission_id)
    say(f"asked job {info.submission_id} to save and stop; Ray kills it after {STOP_WAIT_S} s")
    ended = follow_job(client, str(info.submission_id))
    say(f"job {info.submission_id} is stopped; submit it again to resume")
    return ended
