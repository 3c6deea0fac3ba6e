"""Check a cluster by a job of seconds, and choose where the packages of later jobs come from."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

from diffit_train.config import Recipe
from diffit_train.config.scaling import ClusterStage
from diffit_train.errors import DiffitError, UserError
from diffit_train.machine_checks import differing_versions
from diffit_train.preflight import Check, read_report
from diffit_train.progress import counted, say
from diffit_train.ray_jobs.client import LIVE, connect, failure_reason, job_attempts, send_job
from diffit_train.ray_jobs.job import CLUSTER_STAGES, Job, RuntimeEnv

Choice = Literal["auto", RuntimeEnv]
# Installs from the lock file alone; uv is installed by Ray, without a hash.
FALLBACK: RuntimeEnv = "pip"
POLL_S = 0.5
SLOW_S = 10.0
# A runtime environment is installed in this time, too.
REPORT_TIMEOUT_S = 1800.0


def on_checked_cluster(
    job: Job, address: str, python: str | None, runtime_env: str, *, check: bool = True
) -> Job:
    """The job with its runtime environment, after the cluster has passed all checks.

    A job that runs already is only to be followed, and nothing is checked.

    Args:
        runtime_env: `auto` or one of `RuntimeEnv`.
        check: whether to check at all; `auto` is then `none`.

    Raises:
        UserError: the cluster is unreachable, or not fit for the job; nothing was submitted.
    """
    wanted = _choice(runtime_env, python)
    attempts = job_attempts(connect(address)).get(job.name, [])
    if not check or any(info.status in LIVE for info in attempts):
        return replace(job, runtime_env="none" if wanted == "auto" else wanted)
    stages = CLUSTER_STAGES if job.stage == "pipeline" else (cast(ClusterStage, job.stage),)
    say(f"checking every node of {address}")
    checks, chosen = check_cluster(job.recipe, stages, address, python, wanted, job.env)
    problems = [check.problem() for check in checks if check.fix]
    for problem in problems:
        say(f"  {problem}")
    if problems:
        raise UserError(
            f"{address} is not ready for {job.title}: {counted(len(problems), 'problem')}, see "
            "above; nothing was submitted; --no-check submits it regardless"
        )
    return replace(job, runtime_env=chosen)


def check_cluster(
    recipe: Recipe,
    stages: Sequence[ClusterStage],
    address: str,
    python: str | None = None,
    runtime_env: str = "auto",
    env: Sequence[str] = (),
) -> tuple[list[Check], RuntimeEnv]:
    """Check every node of a cluster by a job, and its versions against this machine's.

    Args:
        stages: what the cluster must be large enough for.
        runtime_env: `auto` or one of `RuntimeEnv`.
        env: names of environment variables that the job needs.

    Returns:
        the checks, and the runtime environment that they were made in.

    Raises:
        UserError: the job server is unreachable, or `runtime_env` is not one of its values.
        DiffitError: the job failed.
    """
    wanted = _choice(runtime_env, python)
    first: RuntimeEnv = "none" if wanted == "auto" else wanted
    checks = _report(recipe, stages, address, python, first, env)
    lacking = [f"{check.check} {check.found}" for check in checks if check.package and check.fix]
    if wanted != "auto":
        return checks, first
    if not lacking:
        say("runtime environment: none, since the cluster's Python has all packages")
        return checks, first
    if python is not None:
        return checks, first
    say(
        f"runtime environment: {FALLBACK}, from the lock file, since the cluster's Python lacks "
        f"packages ({', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}); installing them "
        "on each node takes minutes"
    )
    return _report(recipe, stages, address, python, FALLBACK, env), FALLBACK


def _choice(runtime_env: str, python: str | None) -> Choice:
    choices = ("auto", *get_args(RuntimeEnv))
    if runtime_env not in choices:
        allowed = ", ".join(choices)
        raise UserError(f"--runtime-env is {runtime_env!r}, but must be one of: {allowed}")
    if python is not None and runtime_env in ("pip", "uv"):
        raise UserError(
            f"--runtime-env {runtime_env} makes a Python of its own; omit --python {python!r}"
        )
    return cast(Choice, runtime_env)


def _report(
    recipe: Recipe,
    stages: Sequence[ClusterStage],
    address: str,
    python: str | None,
    runtime_env: RuntimeEnv,
    env: Sequence[str],
) -> list[Check]:
    """The checks of a job that is sent, waited for in silence, and not listed among ours."""
    client = connect(address)
    run = uuid.uuid4().hex[:8]
    job = Job("doctor", recipe, run, env=env, runtime_env=runtime_env, checked=stages)
    submission_id = send_job(client, job, address, python, 1)
    started_s, told = time.monotonic(), False
    while (info := client.get_job_info(submission_id)).status in LIVE:
        waited_s = time.monotonic() - started_s
        if waited_s > REPORT_TIMEOUT_S:
            client.stop_job(submission_id)
            raise DiffitError(
                f"job {submission_id} gave no report in {REPORT_TIMEOUT_S:g} s: "
                f"{info.message or 'no reason given'}"
            )
        if waited_s > SLOW_S and not told:
            say(f"waiting for job {submission_id}: {str(info.status).lower()}")
            told = True
        time.sleep(POLL_S)
    log = client.get_job_logs(submission_id)
    checks = read_report(log)
    if checks is None:
        last = [line for line in log.splitlines() if line.strip()][-1:]
        reason = last[0] if last else failure_reason(info)
        raise DiffitError(f"job {submission_id}, which checks the cluster, failed: {reason}")
    checks = [
        replace(check, fix=f"{check.fix} on every node, or pass --runtime-env {FALLBACK}")
        if check.package and check.fix
        else check
        for check in checks
    ]
    return [*checks, *differing_versions(checks)]
