"""Many Ray jobs, a few at a time, until each is done or has failed permanently."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffit_train.errors import DiffitError
from diffit_train.progress import say

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient
from diffit_train.ray_jobs.client import (
    BAD_INPUT,
    LIVE,
    connect,
    failure_reason,
    job_attempts,
    send_job,
    unreachable_s,
)
from diffit_train.ray_jobs.job import Job


@dataclass
class JobState:
    """State of a job of a fleet.

    Attributes:
        state: waiting, running, done, failed or cancelled.
        failures: failed attempts since the fleet was started.
        reason: why the last attempt failed.
    """

    job: Job
    state: Literal["waiting", "running", "done", "failed", "cancelled"] = "waiting"
    submission_id: str = ""
    failures: int = 0
    reason: str = ""
    begun_s: float = 0.0
    ended_s: float = 0.0


@dataclass(frozen=True)
class FleetPlan:
    """How to run a fleet of jobs.

    Attributes:
        at_most: maximum number of jobs on the cluster at once.
        retries: attempts of a job after the first, in this call; bad input is not retried.
        is_done: whether a job has nothing left to do.
        is_cancelled: whether to stop submitting jobs.
        show: called with all states after each poll.
    """

    at_most: int
    retries: int
    is_done: Callable[[Job], bool]
    is_cancelled: Callable[[], bool]
    show: Callable[[list[JobState]], None]
    python: str | None = None
    pause_s: float = 2.0


def submit_fleet(jobs: Sequence[Job], address: str, plan: FleetPlan) -> list[JobState]:
    """Submit jobs, a few at a time, until each is done or has failed permanently.

    Jobs already on the cluster are followed, and finished ones skipped, so that calling this again
    resumes an earlier call. Waits for a job server that is temporarily unreachable.

    Raises:
        UserError: the job server is unreachable at the start.
        DiffitError: it has been unreachable for minutes.
    """
    client = connect(address)
    states = [JobState(job) for job in jobs]
    for state in states:
        if plan.is_done(state.job):
            state.state = "done"
    silent_s: float | None = None
    while True:
        try:
            _advance(client, states, address, plan)
            silent_s = None
        except (OSError, RuntimeError) as error:  # no connection, or a 5xx response
            now_s = time.monotonic()
            if silent_s is None:
                say(f"{address} is unreachable ({type(error).__name__}); waiting for it")
            silent_s = silent_s or now_s
            if now_s - silent_s > unreachable_s():
                raise DiffitError(
                    f"{address} has been unreachable for {now_s - silent_s:.0f} s; its jobs may "
                    "still be running; rerun the same command to follow them"
                ) from error
        plan.show(states)
        if all(state.state in ("done", "failed", "cancelled") for state in states):
            return states
        time.sleep(plan.pause_s)


def _advance(
    client: JobSubmissionClient, states: list[JobState], address: str, plan: FleetPlan
) -> None:
    """Poll all jobs once, and submit as many as there is room for."""
    attempts = job_attempts(client)
    cancelled = plan.is_cancelled()
    for state in states:
        if state.state in ("done", "failed"):
            continue
        infos = attempts.get(state.job.name, [])
        newest = infos[-1] if infos else None
        if newest is not None and newest.status in LIVE:
            if state.state == "waiting":
                state.state, state.begun_s = "running", time.monotonic()
            state.submission_id = str(newest.submission_id)
        elif state.state == "running":
            _ended(state, newest, plan, cancelled)
        elif cancelled:
            state.state = "cancelled"
    running = sum(state.state == "running" for state in states)
    for state in states:
        if cancelled or running >= plan.at_most:
            return
        if state.state == "waiting":
            number = len(attempts.get(state.job.name, [])) + 1
            state.submission_id = send_job(client, state.job, address, plan.python, number)
            state.state, state.begun_s, state.ended_s = "running", time.monotonic(), 0.0
            running += 1


def _ended(state: JobState, info: JobDetails | None, plan: FleetPlan, cancelled: bool) -> None:
    state.ended_s = time.monotonic()
    if plan.is_done(state.job):
        state.state = "done"
        return
    if cancelled:
        state.state = "cancelled"
        return
    state.failures += 1
    status = "is gone" if info is None else f"ended as {info.status}"
    state.reason = f"{state.submission_id} {status}: {failure_reason(info)}"
    refused = info is not None and info.driver_exit_code == BAD_INPUT
    state.state = "failed" if refused or state.failures > plan.retries else "waiting"
