"""Send a command to a cluster as a Ray job, follow its log, and return how it ended.

A job is known by its name, STAGE-RUN. Submitted again while it runs, it is followed; submitted
again after it ended, a new attempt goes on where the last one stopped, as every command does.
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
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

import diffit_train
from diffit_train.config import Recipe, dump_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say

Stage = Literal["encode", "train", "evaluate"]
LIVE = ("PENDING", "RUNNING")
BAD_INPUT = 2
READY_S = 60.0
TOKEN_FILE = Path.home() / ".ray" / "auth_token"


@dataclass(frozen=True)
class Job:
    """What is submitted."""

    stage: Stage
    recipe: Recipe
    run: str
    steps: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The name under which a later submission finds this one."""
        return f"{self.stage}-{self.run}"

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
        return shlex.join(words)


def job(stage: str, recipe: Recipe, run: str | None, steps: Sequence[str]) -> Job:
    """A job for one of the stages; encoding is named after the latents.

    Raises:
        UserError: unknown stage, or steps for a stage that has none.
    """
    if stage not in get_args(Stage):
        raise UserError(f"stage is {stage!r}, but must be one of {', '.join(get_args(Stage))}")
    if steps and stage != "evaluate":
        raise UserError(f"--step is for evaluate; {stage} has none")
    name = recipe.data.name if stage == "encode" else run or recipe.name
    return Job(cast(Stage, stage), recipe, name, steps)


def submit(job: Job, address: str, *, follow: bool = True, python: str | None = None) -> str:
    """Submit a job, or find it running; its submission id and, if followed, its success.

    Args:
        address: of the cluster's job server, as http://head:8265.
        follow: print the job's log until it ends.
        python: the cluster's Python; by default this one's where the cluster is this machine.

    Raises:
        UserError: no job server answers.
        DiffitError: the job was followed and failed.
    """
    client = _client(address)
    earlier = [
        info for info in client.list_jobs() if (info.metadata or {}).get("diffit.name") == job.name
    ]
    live = [info for info in earlier if info.status in LIVE]
    if live:
        submission_id = str(live[0].submission_id)
        say(f"job {submission_id} is running already")
    else:
        submission_id = _send(client, job, address, python, attempt=len(earlier) + 1)
        say(f"submitted job {submission_id} to {address}")
    if follow:
        _follow(client, submission_id)
    return submission_id


def _client(address: str) -> Any:
    # A cluster started on a machine that has this file asks for its token; jobs sent from there
    # carry it only when told to.
    if TOKEN_FILE.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # Its uploads and sockets are no news to a user.
    logging.getLogger("ray").setLevel(logging.WARNING)
    if urlsplit(address).scheme not in ("http", "https"):
        raise UserError(f"--address is {address!r}, but must be as http://head:8265")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"{address} asks for a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
            "cluster's token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no Ray job server answers at {address}: {str(error).splitlines()[0]}; "
            "start one with `ray start --head`, or mend --address"
        ) from error


def _send(client: Any, job: Job, address: str, python: str | None, attempt: int) -> str:
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


def _send_when_ready(client: Any, request: dict[str, Any]) -> None:
    """A cluster that has just started refuses jobs until its agents have come up."""
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
                    f"no node of the cluster takes jobs after {READY_S:g} s: the head node's "
                    "dashboard agent is not up, or its port is taken (52365, unless `ray start "
                    "--dashboard-agent-listen-port` names another)"
                ) from error
            time.sleep(1.0)


def _stage_files(job: Job, folder: Path) -> None:
    """The job's working folder: its entry point, the recipe, and the package as it is here."""
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


def _follow(client: Any, submission_id: str) -> None:
    async def tail() -> None:
        async for lines in client.tail_job_logs(submission_id):
            sys.stderr.write(lines)
            sys.stderr.flush()

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        say(f"job {submission_id} goes on; the same command follows it again")
        raise
    info = client.get_job_info(submission_id)
    if info.status == "SUCCEEDED":
        say(f"job {submission_id} succeeded")
        return
    reason = str(info.message or "no reason given").splitlines()[0]
    if info.driver_exit_code == BAD_INPUT:
        raise UserError(f"job {submission_id} refused its input; its log above says why")
    raise DiffitError(
        f"job {submission_id} ended as {info.status}: {reason.partition(', last available')[0]}; "
        "the same command continues it"
    )
