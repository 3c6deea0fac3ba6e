"""Submit a command to a cluster as a Ray job, follow its log, and return its outcome.

A job is identified by its name, STAGE-RUN. Submitting it again while it runs follows it;
submitting it again after it ended starts a new attempt that resumes where the last one stopped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args
from urllib.parse import urlsplit

import diffit_train
from diffit_train.config import Recipe, dump_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

Stage = Literal["encode", "train", "evaluate"]
LIVE = ("PENDING", "RUNNING")
BAD_INPUT = 2
READY_S = 60.0
SILENT_S = 300.0
TOKEN_FILE = Path.home() / ".ray" / "auth_token"


@dataclass(frozen=True)
class Job:
    """A job to submit.

    Attributes:
        sweep: the sweep that an evaluation belongs to.
        number: the evaluation's number in the sweep.
    """

    stage: Stage
    recipe: Recipe
    run: str
    steps: Sequence[str] = ()
    sweep: str = ""
    number: int = 0

    @property
    def name(self) -> str:
        """The name by which a later submission finds this one."""
        name = f"{self.stage}-{self.run}"
        return f"{name}-{self.sweep}-{self.number:04d}" if self.sweep else name

    def metadata(self) -> dict[str, str]:
        """Metadata of the Ray job."""
        encode = self.stage == "encode"
        recipe_hash = self.recipe.encode_hash() if encode else self.recipe.train_hash()
        return {
            "diffit.name": self.name,
            "diffit.run": self.run,
            "diffit.recipe_hash": recipe_hash,
            "diffit.version": version("diffit-train"),
        }

    def entrypoint(self, python: str) -> str:
        """The shell command of the job."""
        words = [python, f"{self.stage}.py", "recipe.yaml"]
        if self.stage != "encode":
            words += ["--run", self.run]
        for step in self.steps:
            words += ["--step", step]
        if self.sweep:
            words += ["--sweep-member", self.sweep]
        return shlex.join(words)


def job(stage: str, recipe: Recipe, run: str | None, steps: Sequence[str]) -> Job:
    """A job for one of the stages; encoding jobs are named after the latents.

    Raises:
        UserError: unknown stage, or steps for a stage that takes none.
    """
    if stage not in get_args(Stage):
        raise UserError(f"stage is {stage!r}, but must be one of {', '.join(get_args(Stage))}")
    if steps and stage != "evaluate":
        raise UserError(f"--step is only for evaluate, not for {stage}")
    name = recipe.data.name if stage == "encode" else run or recipe.name
    return Job(cast(Stage, stage), recipe, name, steps)


def submit(job: Job, address: str, *, follow: bool = True, python: str | None = None) -> str:
    """Submit a job, or find it running; returns its submission id.

    Args:
        address: the cluster's job server, such as http://head:8265.
        follow: print the job's log until it ends.
        python: the cluster's Python; by default this one if the cluster is this machine.

    Raises:
        UserError: the job server is unreachable.
        DiffitError: the job was followed and failed.
    """
    client = _client(address)
    earlier = _attempts(client).get(job.name, [])
    live = [info for info in earlier if info.status in LIVE]
    if live:
        submission_id = str(live[0].submission_id)
        say(f"job {submission_id} is already running")
    else:
        submission_id = _send(client, job, address, python, attempt=len(earlier) + 1)
        say(f"submitted job {submission_id} to {address}")
    if follow:
        _follow(client, submission_id)
    return submission_id


def _attempts(client: JobSubmissionClient) -> dict[str, list[JobDetails]]:
    """All attempts of our jobs on the cluster, in order, by job name."""
    found: dict[str, list[JobDetails]] = {}
    for info in client.list_jobs():
        metadata = info.metadata or {}
        if "diffit.name" in metadata:
            found.setdefault(metadata["diffit.name"], []).append(info)
    for infos in found.values():
        infos.sort(key=lambda info: int(info.metadata.get("diffit.attempt", 0)))
    return found


# ---- Many jobs ----


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
    client = _client(address)
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
            if now_s - silent_s > SILENT_S:
                raise DiffitError(
                    f"{address} has been unreachable for {SILENT_S:g} s; its jobs may still be "
                    "running; rerun the same command to follow them"
                ) from error
        plan.show(states)
        if all(state.state in ("done", "failed", "cancelled") for state in states):
            return states
        time.sleep(plan.pause_s)


def cancel_jobs(names: Sequence[str], address: str) -> int:
    """Stop those of the named jobs that are on the cluster; returns how many."""
    client = _client(address)
    attempts, stopped = _attempts(client), 0
    for name in names:
        for info in attempts.get(name, []):
            if info.status in LIVE:
                client.stop_job(info.submission_id)
                stopped += 1
    return stopped


def _advance(
    client: JobSubmissionClient, states: list[JobState], address: str, plan: FleetPlan
) -> None:
    """Poll all jobs once, and submit as many as there is room for."""
    attempts = _attempts(client)
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
            state.submission_id = _send(client, state.job, address, plan.python, number)
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
    state.reason = f"{state.submission_id} {status}: {_why(info)}"
    refused = info is not None and info.driver_exit_code == BAD_INPUT
    state.state = "failed" if refused or state.failures > plan.retries else "waiting"


def _why(info: JobDetails | None) -> str:
    message = str(getattr(info, "message", None) or "no reason given")
    return message.splitlines()[0].partition(", last available")[0]


def _client(address: str) -> JobSubmissionClient:
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
            f"could not reach a Ray job server at {address}: {str(error).splitlines()[0]}; "
            "start one with `ray start --head`, or fix --address"
        ) from error


def _send(
    client: JobSubmissionClient, job: Job, address: str, python: str | None, attempt: int
) -> str:
    submission_id = f"{job.name}-{attempt}"
    folder = Path(tempfile.mkdtemp(prefix="diffit-submit-"))
    request = {
        "entrypoint": job.entrypoint(python or _python(address)),
        "submission_id": submission_id,
        "metadata": {**job.metadata(), "diffit.attempt": str(attempt)},
        "runtime_env": {
            "working_dir": str(folder),
            "env_vars": {"DIFFIT_SUBMISSION_ID": submission_id, "PYTHONUNBUFFERED": "1"},
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


def _python(address: str) -> str:
    local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    return sys.executable if local else "python"


def _follow(client: JobSubmissionClient, submission_id: str) -> None:
    async def tail() -> None:
        async for lines in client.tail_job_logs(submission_id):
            sys.stderr.write(lines)
            sys.stderr.flush()

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        say(f"job {submission_id} keeps running; rerun the same command to follow it")
        raise
    info = client.get_job_info(submission_id)
    if info.status == "SUCCEEDED":
        say(f"job {submission_id} succeeded")
        return
    if info.driver_exit_code == BAD_INPUT:
        raise UserError(f"job {submission_id} rejected its input; see its log above")
    raise DiffitError(
        f"job {submission_id} ended as {info.status}: {_why(info)}; rerun the same command to "
        "resume"
    )
