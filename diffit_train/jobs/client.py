"""A cluster's job server: connect, list and stop jobs, send one."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import diffit_train
from diffit_train import storage
from diffit_train.config import dump_recipe
from diffit_train.errors import DiffitError, UserError, redact
from diffit_train.jobs.job import STAGE_LINE, Job, RuntimeEnv
from diffit_train.jobs.node import SETUP_HOOK, write_forwarded, write_requirements
from diffit_train.ray_session import TOKEN_FILE
from diffit_train.tracking import require_forwarded

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

LIVE = ("PENDING", "RUNNING")
# For how long a job that is asked to stop may save its work before Ray kills it; Ray's own default
# is 3 s.
STOP_WAIT_S = 900
PACKAGE_FOLDER = Path(diffit_train.__file__).parent
# Where PyTorch publishes its CPU builds; those that the lock file for CPU nodes names.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def ping(address: str) -> None:
    """Ask a job server for its version: requests of Ray's client have no time limit.

    Raises:
        OSError: there is no answer.
    """
    import requests

    requests.get(f"{address}/api/version", timeout=storage.attempt_s())


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server.

    Raises:
        UserError: the address is malformed, unreachable, or requires a token.
        DiffitError: something listens there, and does not answer.
    """
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # A cluster started on a machine with this file requires its token; clients send it only in
    # this mode.
    if TOKEN_FILE.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray logs every upload; the module sets its own level.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if urlsplit(address).scheme not in ("http", "https"):
        raise UserError(f"--address is {address!r}, but must look like http://head:8265")
    try:
        limited = storage.retry(
            f"the job server at {redact(address)}",
            lambda error: isinstance(error, requests.Timeout),
        )
        limited(lambda: ping(address))
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"{address} requires a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
            "cluster's token"
        ) from error
    except requests.Timeout as error:
        raise DiffitError(
            f"the job server at {redact(address)} has not answered for {storage.limit_s():g} s; "
            "rerun the same command to resume"
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"could not reach a Ray job server at {address}; start one with `ray start --head`, or "
            "fix --address"
        ) from error


def job_attempts(client: JobSubmissionClient) -> dict[str, list[JobDetails]]:
    """All attempts of our jobs on the cluster, in order, by job name."""
    attempts: dict[str, list[JobDetails]] = {}
    for info in client.list_jobs():
        metadata = info.metadata or {}
        if "diffit.name" in metadata:
            attempts.setdefault(metadata["diffit.name"], []).append(info)
    for infos in attempts.values():
        infos.sort(key=lambda info: int(info.metadata.get("diffit.attempt", 0)))
    return attempts


def list_jobs(client: JobSubmissionClient) -> list[dict[str, str]]:
    """The newest attempt of each of our jobs on a cluster, newest first."""
    newest = [attempts[-1] for attempts in job_attempts(client).values()]
    newest = [info for info in newest if info.metadata.get("diffit.stage") != "doctor"]
    newest.sort(key=lambda info: -(info.start_time or 0))
    return [
        {
            "name": str(info.submission_id),
            "stage": info.metadata.get("diffit.stage", ""),
            "run": info.metadata.get("diffit.run", ""),
            "state": str(info.status).lower(),
            "age": str(timedelta(seconds=round(time.time() - (info.start_time or 0) / 1000.0))),
            "root": info.metadata.get("diffit.root", ""),
            "progress": _log_progress(client.get_job_logs(str(info.submission_id))),
        }
        for info in newest
    ]


def _log_progress(log: str) -> str:
    """The last line of a log, after the stage that a pipeline is in."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    stages = [line for line in lines if line.startswith(STAGE_LINE)]
    last = [line for line in lines[-1:] if line not in stages]
    return "; ".join([*(line.removeprefix(STAGE_LINE) for line in stages[-1:]), *last])


def find_jobs(client: JobSubmissionClient, pattern: str) -> list[JobDetails]:
    """The newest attempts of jobs, by submission id, name, or STAGE-RUN, in which `*` is anything.

    Raises:
        UserError: there is none, or several although the pattern has no `*`.
    """
    attempts = job_attempts(client)
    matches = {
        name: info
        for name, infos in attempts.items()
        for info in infos
        for title in (info.submission_id, name, info.metadata.get("diffit.title", ""))
        if fnmatch.fnmatchcase(title, pattern)
    }
    if not matches:
        known = ", ".join(sorted(infos[-1].submission_id for infos in attempts.values()))
        raise UserError(f"no job is named {pattern!r}; the cluster has: {known or 'none'}")
    if len(matches) > 1 and "*" not in pattern:
        choices = ", ".join(sorted(str(info.submission_id) for info in matches.values()))
        raise UserError(f"{pattern!r} names jobs of several roots: {choices}; choose one")
    return list(matches.values())


def send_job(
    client: JobSubmissionClient, job: Job, address: str, python: str | None, attempt: int
) -> str:
    """Submit an attempt of a job; its submission id.

    Raises:
        UserError: a variable to forward is not set.
        DiffitError: the cluster refused it.
        RuntimeError: the cluster has just started and has no agents yet.
    """
    submission_id = f"{job.name}-{attempt}"
    folder = Path(tempfile.mkdtemp(prefix="diffit-submit-"))
    runtime_env: dict[str, Any] = {
        "working_dir": str(folder),
        "env_vars": {
            "DIFFIT_SUBMISSION_ID": submission_id,
            "PYTHONUNBUFFERED": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        },
    }
    if job.env:
        runtime_env["worker_process_setup_hook"] = SETUP_HOOK
    try:
        _stage_files(job, folder)
        client.submit_job(
            entrypoint=job.entrypoint(python or _python(address, job.runtime_env)),
            submission_id=submission_id,
            metadata={**job.metadata(), "diffit.attempt": str(attempt)},
            runtime_env=runtime_env | locked_packages(job, folder),
        )
    except RuntimeError as error:
        if "No available agent" in str(error):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise DiffitError(f"the cluster refused job {submission_id}: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return submission_id


def _stage_files(job: Job, folder: Path) -> None:
    """Fill the job's working directory: its entry point, the recipe, and this package."""
    if job.script:
        shutil.copy(_shipped("pipelines") / job.script, folder)
    image = job.runtime_env == "image"
    # The check of a cluster brings its own code, to say clearly that the image has none.
    if not image or job.stage == "doctor":
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE_FOLDER, folder / PACKAGE_FOLDER.name, ignore=ignored)
    write_requirements(folder, installed=image)
    require_forwarded(job.run.recipe, "a job", job.env)
    (folder / "recipe.yaml").write_text(dump_recipe(job.run.recipe))
    write_forwarded(folder, job.env)


def _shipped(name: str) -> Path:
    """A folder of the repository that a wheel carries inside the package."""
    inside = PACKAGE_FOLDER / name
    return inside if inside.is_dir() else PACKAGE_FOLDER.parent / name


def locked_packages(job: Job, folder: Path) -> dict[str, Any]:
    """The part of Ray's runtime environment that installs the lock file's packages, if any.

    The file's name has its hash, by which Ray tells whether a node has the environment already.
    PyTorch's CPU builds come from its own index, or from PIP_EXTRA_INDEX_URL.

    Raises:
        UserError: that holds a password.
    """
    if job.runtime_env not in ("pip", "uv"):
        return {}
    device = "gpu" if job.run.recipe.scaling.uses_gpus else "cpu"
    lock = (_shipped("cluster") / f"requirements-{device}.lock").read_bytes()
    name = f"requirements-{device}-{hashlib.sha256(lock).hexdigest()[:12]}.lock"
    (folder / name).write_bytes(lock)
    options = ["--require-hashes", "--no-deps"]
    index = os.environ.get("PIP_EXTRA_INDEX_URL", CPU_INDEX) if device == "cpu" else ""
    if redact(index) != index:
        raise UserError(
            "PIP_EXTRA_INDEX_URL holds a password, and would be shown with the job; set it in the "
            "nodes' pip.conf, and PIP_EXTRA_INDEX_URL= for this command"
        )
    if index:
        options += ["--extra-index-url", index]
    packages = [f"-r ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{name}"]
    if job.runtime_env == "uv":
        # By default uv takes a package from the first index that has it.
        options += ["--index-strategy", "unsafe-best-match"]
        return {"uv": {"packages": packages, "uv_pip_install_options": options}}
    return {"pip": {"packages": packages, "pip_install_options": options}}


def _python(address: str, runtime_env: RuntimeEnv) -> str:
    """The interpreter of a job: this one if the cluster is this machine, unless it gets its own."""
    local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    return sys.executable if local and runtime_env in ("none", "image") else "python"
