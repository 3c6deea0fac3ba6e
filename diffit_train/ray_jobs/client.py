"""A cluster's job server: connect, list, send, stop."""

from __future__ import annotations

import functools
import hashlib
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
from diffit_train.preflight import write_requirements
from diffit_train.ray_jobs.job import Job, RuntimeEnv
from diffit_train.redaction import redact
from diffit_train.retry import attempt_s, limit_s, retry
from diffit_train.tracking import require_forwarded

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

LIVE = ("PENDING", "RUNNING")
BAD_INPUT = 2
READY_S = 60.0
# Of the limit for a call: jobs go on without their server, whose node may be replaced meanwhile.
FOLLOWING_LIMITS = 5
# For how long a job that is asked to stop may save its work before Ray kills it; Ray's own default
# is 3 s.
STOP_WAIT_S = 900
PACKAGE_FOLDER = Path(diffit_train.__file__).parent
# Where PyTorch publishes its CPU builds; those that the lock file for CPU nodes names.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TOKEN_FILE = Path.home() / ".ray" / "auth_token"


class NoAnswerError(DiffitError, TimeoutError):
    """A job server accepts requests and does not answer."""


def unreachable_s() -> float:
    """For how long those who follow jobs wait for a job server that is away."""
    return FOLLOWING_LIMITS * limit_s()


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
        NoAnswerError: it does not answer; the client's methods raise it, too.
    """
    # A cluster started on a machine with this file requires its token; clients send it only in
    # this mode.
    if TOKEN_FILE.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError

    # Ray logs every upload; the module sets a level of its own.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if urlsplit(address).scheme not in ("http", "https"):
        raise UserError(f"--address is {address!r}, but must look like http://head:8265")
    try:
        return _limited_client()(address)
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


@functools.cache
def _limited_client() -> type[JobSubmissionClient]:
    """Ray's client, whose requests have no time limit, with ours."""
    import requests
    from ray.job_submission import JobSubmissionClient

    class LimitedClient(JobSubmissionClient):  # type: ignore[misc]
        """Ends a request that is not answered."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            # Not a submission, which may have arrived, nor a package, which takes its time to send.
            again = method not in ("POST", "PUT")
            seconds = attempt_s() if again else limit_s()
            request = functools.partial(super()._do_request, method, endpoint, **options)
            address, started_s = redact(self.get_address()), time.monotonic()
            try:
                return retry(
                    f"the job server at {address}",
                    lambda error: again and isinstance(error, requests.Timeout),
                )(lambda: request(timeout=seconds))
            except requests.Timeout as error:
                raise NoAnswerError(
                    f"the job server at {address} has not answered for "
                    f"{time.monotonic() - started_s:.0f} s; rerun the same command to resume"
                ) from error

    return LimitedClient


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
    request: dict[str, Any] = {
        "entrypoint": job.entrypoint(python or _python(address, job.runtime_env)),
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
        request["runtime_env"] |= locked_packages(job, folder)
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
    shutil.copy(_shipped("pipelines") / f"{job.script}.py", folder)
    image = job.runtime_env == "image"
    # The check of a cluster brings its own code, to say clearly that the image has none.
    if not image or job.stage == "doctor":
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE_FOLDER, folder / PACKAGE_FOLDER.name, ignore=ignored)
    write_requirements(folder, installed=image)
    require_forwarded(job.recipe, "a job", job.env)
    (folder / "recipe.yaml").write_text(dump_recipe(job.recipe))
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
    device = "gpu" if job.recipe.scaling.uses_gpus else "cpu"
    lock = (_shipped("cluster") / f"requirements-{device}.lock").read_bytes()
    name = f"requirements-{device}-{hashlib.sha256(lock).hexdigest()[:12]}.lock"
    (folder / name).write_bytes(lock)
    options = ["--require-hashes", "--no-deps"]
    if device == "cpu" and (index := _cpu_index()):
        options += ["--extra-index-url", index]
    packages = [f"-r ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{name}"]
    if job.runtime_env == "uv":
        # By default uv takes a package from the first index that has it.
        options += ["--index-strategy", "unsafe-best-match"]
        return {"uv": {"packages": packages, "uv_pip_install_options": options}}
    return {"pip": {"packages": packages, "pip_install_options": options}}


def _cpu_index() -> str:
    """Where nodes find PyTorch's CPU builds; empty for where their own pip.conf says."""
    index = os.environ.get("PIP_EXTRA_INDEX_URL", CPU_INDEX)
    if redact(index) != index:
        raise UserError(
            "PIP_EXTRA_INDEX_URL holds a password, and would be shown with the job; set it in the "
            "nodes' pip.conf, and PIP_EXTRA_INDEX_URL= for this command"
        )
    return index


def _python(address: str, runtime_env: RuntimeEnv) -> str:
    """The interpreter of a job: this one if the cluster is this machine, unless it gets its own."""
    local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    return sys.executable if local and runtime_env in ("none", "image") else "python"
