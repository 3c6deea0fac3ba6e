"""Submit one job and follow its log to the end, across lost connections and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say
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
from diffit_train.retry import attempt_s

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# Between attempts to reach a job server that is away.
RECONNECT_S = 2.0


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
    client = connect(address)
    earlier = job_attempts(client).get(job.name, [])
    live = [info for info in earlier if info.status in LIVE]
    attempt = len(earlier) + 1
    if live:
        submission_id = str(live[0].submission_id)
        say(f"job {submission_id} is already running")
    else:
        submission_id = send_job(client, job, address, python, attempt)
        say(f"submitted job {submission_id} to {address}")
        attempt += 1
    if not follow:
        return submission_id
    for left in range(restarts, -1, -1):
        info = follow_job(client, submission_id)
        if info.status != "FAILED" or info.driver_exit_code == BAD_INPUT or not left:
            break
        say(f"job {submission_id} failed: {failure_reason(info)}; restarting it ({left} left)")
        submission_id = send_job(client, job, address, python, attempt)
        attempt += 1
    require_success(info)
    return submission_id


def require_success(info: JobDetails) -> None:
    """Report how a job ended.

    Raises:
        UserError: it rejected its input.
        DiffitError: it failed or was stopped.
    """
    submission_id = info.submission_id
    if info.status == "SUCCEEDED":
        say(f"job {submission_id} succeeded")
        return
    if info.driver_exit_code == BAD_INPUT:
        raise UserError(f"job {submission_id} rejected its input; see its log above")
    raise DiffitError(
        f"job {submission_id} ended as {info.status}: {failure_reason(info)}; rerun the same "
        "command to resume"
    )


def follow_job(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    """Print a job's log until it ends; returns how it ended.

    Waits for a job server that is temporarily unreachable.

    Raises:
        DiffitError: it was unreachable for minutes.
    """
    printed, silent_s = 0, None
    while True:
        try:
            printed += asyncio.run(_print_log(client, submission_id, printed))
            info = client.get_job_info(submission_id)
        except KeyboardInterrupt:
            say(f"job {submission_id} keeps running; rerun the same command to follow it")
            raise
        except (OSError, RuntimeError) as error:  # no connection, or a 5xx response
            now_s = time.monotonic()
            if silent_s is None:
                say(f"lost the connection to the job server ({type(error).__name__}); reconnecting")
                silent_s = now_s
            if now_s - silent_s > unreachable_s():
                raise DiffitError(
                    f"the job server has been unreachable for {now_s - silent_s:.0f} s; job "
                    f"{submission_id} may still be running; rerun the same command to follow it"
                ) from error
            time.sleep(RECONNECT_S)
            continue
        silent_s = None
        if info.status not in LIVE:
            return info
        time.sleep(RECONNECT_S)


async def _print_log(client: JobSubmissionClient, submission_id: str, skip: int) -> int:
    """Print the log as it grows, without its first `skip` characters; how many were printed.

    Raises:
        OSError: the connection was lost, or its server does not answer anymore.
    """
    import aiohttp

    seen = printed = 0
    log = client.tail_job_logs(submission_id)
    try:
        while (text := await _next_text(client, submission_id, log)) is not None:
            new = text[max(0, skip - seen) :]
            seen += len(text)
            printed += len(new)
            sys.stderr.write(new)
            sys.stderr.flush()
    except aiohttp.ClientError as error:
        if not printed:
            raise ConnectionError(str(error)) from error
    except OSError:
        if not printed:
            raise
    return printed


async def _next_text(
    client: JobSubmissionClient, submission_id: str, log: AsyncIterator[str]
) -> str | None:
    """The next piece of a log; None at its end.

    While there is none, the server is asked now and then, since a lost one is as silent as a job
    that computes.
    """
    following = asyncio.ensure_future(anext(log, None))
    try:
        while True:
            await asyncio.wait({following}, timeout=attempt_s())
            if following.done():
                return following.result()
            await _in_thread(lambda: client.get_job_info(submission_id))
    finally:
        following.cancel()


async def _in_thread(call: Callable[[], object]) -> None:
    """Wait for a call in a thread; unlike asyncio's threads, it does not hold up Ctrl-C."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not ended.done():
            ended.set_exception(error) if error else ended.set_result(None)

    def run() -> None:
        error: BaseException | None = None
        try:
            call()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="job-server", daemon=True).start()
    await ended
