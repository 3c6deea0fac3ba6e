"""Run jobs on a cluster, a few at a time, and follow them across lost connections and restarts."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError, first_line
from diffit_train.jobs.client import LIVE, connect, job_attempts, ping, send_job
from diffit_train.jobs.job import Job
from diffit_train.progress import say

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

BAD_INPUT = 2
POLL_S = 1.0
# Of the limit for a call: jobs go on without their server, whose node may be replaced meanwhile.
FOLLOWING_LIMITS = 5


@dataclass
class JobState:
    """How far a job is.

    Attributes:
        name: of the job.
        job: None if it is only followed.
        failures: failed attempts since the fleet was started.
        reason: why the last attempt ended without success.
    """

    name: str
    job: Job | None = None
    state: Literal["waiting", "running", "done", "failed", "stopped"] = "waiting"
    submission_id: str = ""
    failures: int = 0
    reason: str = ""
    refused: bool = False
    begun_s: float = 0.0
    ended_s: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.state in ("done", "failed", "stopped")


@dataclass
class Fleet:
    """Jobs on a cluster that run until each is done, is stopped, or has failed for good.

    Jobs that the cluster runs already are followed, so that a second fleet resumes the first. Once
    one was stopped, no other is submitted.

    Attributes:
        address: of the job server.
        max_concurrent: number of jobs on the cluster at once.
        retries: attempts of a job after the first; rejected input is not retried.
        python: the cluster's Python.
        show: called with all states after each poll, instead of printing the jobs' logs.
    """

    address: str
    states: list[JobState]
    max_concurrent: int = 1
    retries: int = 0
    python: str | None = None
    show: Callable[[list[JobState]], None] | None = None
    printed: dict[str, int] = field(default_factory=dict)
    silent_since_s: float | None = None

    def run(self, *, follow: bool = True) -> None:
        """Submit and follow the jobs; without `follow`, return once all are submitted.

        Waits for a job server that is temporarily unreachable.

        Raises:
            UserError: the job server is unreachable at the start.
            DiffitError: it has been unreachable for minutes, or refuses a job.
        """
        client = connect(self.address)
        try:
            while not self._look(client, follow):
                self._pause(client)
        except KeyboardInterrupt:
            live = [state.submission_id for state in self.states if state.state == "running"]
            if live:
                say(f"{', '.join(live)} still running; rerun the same command to follow")
            raise

    def _look(self, client: JobSubmissionClient, follow: bool) -> bool:
        """Look at the jobs if the server answers; returns whether there is nothing to wait for.

        Raises:
            DiffitError: the server has been unreachable for minutes.
        """
        try:
            ping(self.address)
            self._poll(client)
            self.silent_since_s = None
        except (OSError, RuntimeError) as error:  # no connection, or a 5xx response
            now_s = time.monotonic()
            if self.silent_since_s is None:
                say(f"waiting for {self.address}: {first_line(error)}")
                self.silent_since_s = now_s
            silent_s = now_s - self.silent_since_s
            if silent_s > FOLLOWING_LIMITS * storage.limit_s():
                raise DiffitError(
                    f"{self.address} has been unreachable for {silent_s:.0f} s; its jobs may still "
                    "be running; rerun the same command to follow them"
                ) from error
        if self.show:
            self.show(self.states)
        return all(s.ended or (s.state == "running" and not follow) for s in self.states)

    def _poll(self, client: JobSubmissionClient) -> None:
        """Look at all jobs once, and submit as many as there is room for."""
        attempts = job_attempts(client)
        known = {str(info.submission_id): info for infos in attempts.values() for info in infos}
        for state in self.states:
            if state.state == "running":
                info = known.get(state.submission_id)
                if info is None or info.status not in LIVE:
                    self._end(client, state, info)
            elif state.state == "waiting":
                for info in attempts.get(state.name, [])[-1:]:
                    if info.status in LIVE:
                        self._begin(state, str(info.submission_id), "is already running")
        stopped = any(state.state == "stopped" for state in self.states)
        for state in self.states:
            running = sum(other.state == "running" for other in self.states)
            if state.state == "waiting" and stopped:
                state.state, state.reason = "stopped", "is not submitted, as another was stopped"
            elif state.state == "waiting" and state.job and running < self.max_concurrent:
                number = len(attempts.get(state.name, [])) + 1
                submission_id = send_job(client, state.job, self.address, self.python, number)
                self._begin(state, submission_id, f"submitted to {self.address}")

    def _begin(self, state: JobState, submission_id: str, news: str) -> None:
        state.state, state.submission_id = "running", submission_id
        state.begun_s, state.ended_s = time.monotonic(), 0.0
        if self.show is None:
            say(f"job {submission_id} {news}")

    def _end(self, client: JobSubmissionClient, state: JobState, info: JobDetails | None) -> None:
        """Note how an attempt ended."""
        if self.show is None:
            asyncio.run(self._print_log(client, state.submission_id))
        state.ended_s = time.monotonic()
        if info is not None and info.status == "SUCCEEDED":
            state.state = "done"
            return
        message = str(getattr(info, "message", None) or "no reason given").splitlines()[0]
        status = "is gone" if info is None else f"ended as {info.status}"
        state.reason = f"{status}: {message.partition(', last available')[0]}"
        if info is not None and info.status == "STOPPED":
            state.state = "stopped"
            return
        state.failures += 1
        state.refused = info is not None and info.driver_exit_code == BAD_INPUT
        final = state.refused or state.job is None or state.failures > self.retries
        state.state = "failed" if final else "waiting"
        if not final and self.show is None:
            left = self.retries - state.failures
            say(f"job {state.submission_id} {state.reason}; restarting it ({left} left after that)")

    def _pause(self, client: JobSubmissionClient) -> None:
        """Wait before the next look at the jobs; meanwhile print the log of the one that runs."""
        if self.show is None:
            for state in self.states:
                if state.state == "running":
                    asyncio.run(self._print_log(client, state.submission_id))
        time.sleep(POLL_S)

    async def _print_log(self, client: JobSubmissionClient, submission_id: str) -> None:
        """Print what is new in a job's log, as it grows, until it ends or has been silent.

        Whether the server is lost or the job computes, the next poll shows.
        """
        import aiohttp

        seen, limit_s = 0, storage.attempt_s()
        log = client.tail_job_logs(submission_id)
        with suppress(OSError, RuntimeError, aiohttp.ClientError):  # TimeoutError is an OSError
            while (text := await asyncio.wait_for(anext(log, None), limit_s)) is not None:
                printed = self.printed.get(submission_id, 0)
                new = text[max(0, printed - seen) :]
                seen += len(text)
                self.printed[submission_id] = printed + len(new)
                sys.stderr.write(new)
                sys.stderr.flush()


def submit(
    job: Job,
    address: str,
    *,
    follow: bool = True,
    python: str | None = None,
    restarts: int = 0,
) -> str:
    """Submit a job, or find it running; returns the submission id of its last attempt.

    Args:
        address: the cluster's job server, such as http://head:8265.
        follow: print the job's log until it ends.
        python: the cluster's Python; by default this one if the cluster is this machine.
        restarts: how often to submit a followed job again after it failed, as when the node of its
            driver died. It resumes. Rejected input and stopped jobs are not retried.

    Raises:
        UserError: the job server is unreachable, or the job rejected its input.
        DiffitError: the job was followed and failed.
    """
    state = JobState(job.name, job)
    Fleet(address, [state], retries=restarts, python=python).run(follow=follow)
    if follow:
        require_success(state)
    return state.submission_id


def follow_jobs(address: str, infos: list[JobDetails]) -> list[JobState]:
    """Print the logs of jobs until all have ended."""
    states = [
        JobState(i.metadata["diffit.name"], state="running", submission_id=str(i.submission_id))
        for i in infos
    ]
    Fleet(address, states).run()
    return states


def require_success(state: JobState) -> None:
    """Report how a job ended.

    Raises:
        UserError: it rejected its input.
        DiffitError: it failed or was stopped.
    """
    if state.refused:
        raise UserError(f"job {state.submission_id} rejected its input; see its log above")
    if state.state != "done":
        raise DiffitError(
            f"job {state.submission_id} {state.reason}; rerun the same command to resume"
        )
    say(f"job {state.submission_id} succeeded")
