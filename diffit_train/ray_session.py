"""Connect to Ray: an existing cluster, or a private one on this machine for the block."""

from __future__ import annotations

import logging
import math
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psutil

from diffit_train.errors import DiffitError, UserError
from diffit_train.forwarded_env import FILE, SETUP_HOOK
from diffit_train.progress import say
from diffit_train.redaction import first_line
from diffit_train.retry import attempt_s, limit_s, retry

# Without it, Ray would join any cluster that happens to run on this machine.
NEW_CLUSTER = "local"
CONNECT_TIMEOUT_S = 10.0
NODE_TIMEOUT_S = 120.0
# Between looks at a cluster that is to grow, and at the raylet of this machine.
GROWTH_POLL_S = 5.0
RAYLET_POLL_S = 2.0
# The preface of a client, and an empty frame of settings (RFC 9113, sections 3.4 and 6.5).
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
T = TypeVar("T")
# Environment for processes that compute on a CPU: keep freed memory. By default glibc returns each
# freed block above 32 MiB to the kernel, which zeroes it again page by page: a fifth of the time in
# a loop over an autoencoder's activations, a third in a ZeRO step with 108M parameters. Must be set
# before the process starts.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_ARENA_MAX": "1",
}


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """A Ray session for the block.

    If the raylet of this machine dies meanwhile, the process says so and exits with status 1: calls
    of Ray would wait forever, and the next command resumes.

    Args:
        address: `host:port`, `ray://host:port` or `auto`; None for RAY_ADDRESS (set inside a Ray
            job), or else a new cluster on this machine.

    Raises:
        UserError: no cluster is reachable at the address.
        DiffitError: there is one, but this machine has no live raylet of it.
    """
    # No usage reports leave the machine; set to 1 to send them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or NEW_CLUSTER
    _require_answer(address)
    what = "Ray on this machine" if address == NEW_CLUSTER else f"the Ray cluster at {address}"
    say(f"{'Starting' if address == NEW_CLUSTER else 'Connecting to'} {what}")
    try:
        with (
            _minimal_private_cluster() if address == NEW_CLUSTER else nullcontext(),
        ):
            ray.init(
                address=address,
                include_dashboard=False if address == NEW_CLUSTER else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # Workers set the variables that were forwarded with a job.
                runtime_env={"worker_process_setup_hook": SETUP_HOOK} if FILE.exists() else None,
            )
    except ConnectionError as error:
        raise DiffitError(
            f"something listens at {address}, but no live raylet of this machine belongs to it: "
            f"{first_line(error)}; start one with `ray start`, or fix --address"
        ) from error
    except ValueError as error:
        raise UserError(_unreachable(address, error)) from error
    if address == NEW_CLUSTER:
        folder = _session_folder()
        if folder is not None:
            # Ray makes it for everybody to write to: logs, sockets and packages included.
            folder.chmod(0o700)
            _expect_end(folder)
    try:
        with _exit_without_raylet():
            yield
    finally:
        ray.shutdown()


def _session_folder() -> Path | None:
    """The folder of a cluster that was started here; there is no public name of it."""
    import ray

    node = ray._private.worker._global_node
    return None if node is None else Path(node.get_session_dir_path())


def _expect_end(folder: Path) -> None:
    """Let the agents of a cluster that was started here end as soon as it does.

    If the command is killed, its raylet and GCS end with it. The two agents would then try for 60 s
    to tell the GCS that the raylet was lost, unless its log says that it was told to end
    (`report_raylet_error_logs` in Ray's `process_watcher.py`). There is no option for it.
    """
    with (folder / "logs" / "raylet.out").open("a") as log:
        log.write("Raylet received SIGTERM if its command is gone (written by diffit)\n")


@contextmanager
def _exit_without_raylet() -> Iterator[None]:
    """Exit if the raylet of this machine dies while the block runs."""
    raylet = _raylet()
    ended = threading.Event()

    def watch(raylet: psutil.Process) -> None:
        while not ended.wait(RAYLET_POLL_S):
            if _alive(raylet) or ended.is_set():
                continue
            folder = _session_folder()
            logs = f"; its logs are in {folder}/logs" if folder else ""
            say(
                f"failed: Ray on this machine has died (raylet, process {raylet.pid}){logs}; rerun "
                "the same command to resume"
            )
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # a progress bar hides the cursor
            sys.stderr.flush()
            os._exit(1)  # as if killed: what cleans up would wait for Ray, too

    if raylet is not None:
        threading.Thread(target=watch, args=(raylet,), name="raylet", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _raylet() -> psutil.Process | None:
    """The raylet that this process talks to; None if it is on another machine or in a container."""
    import ray

    node = ray._private.worker._global_node
    if node is None or not hasattr(socket, "SO_PEERCRED"):
        return None
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(node.raylet_socket_name.removeprefix("unix:"))
        size = struct.calcsize("3i")
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid = struct.unpack("3i", credentials)[0]
    return psutil.Process(pid) if pid and psutil.pid_exists(pid) else None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _minimal_private_cluster() -> Iterator[None]:
    """Make a cluster started in the block listen on 127.0.0.1 only, with few processes.

    Otherwise all its processes listen on all interfaces. There is no public option: Ray replaces
    `_node_ip_address="127.0.0.1"` with the network interface's address. This private switch keeps
    it on loopback, as on macOS. A private cluster does not need the autoscaler, the log monitor and
    the dashboard process either; they cost seconds of CPU, and one at the end. If a later Ray drops
    one of these names, changing it has no effect.
    """
    from ray._private import ray_constants
    from ray._private.node import Node

    changes: list[tuple[Any, str, Any]] = [
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        (Node, "start_monitor", lambda node: None),
        (Node, "start_log_monitor", lambda node: None),
    ]
    if os.environ["RAY_USAGE_STATS_ENABLED"] == "0":  # the dashboard's process sends reports
        changes.append((Node, "start_api_server", _no_dashboard))
    before = [getattr(owner, name, None) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


def _no_dashboard(node: Any, **_: object) -> None:
    """In place of `Node.start_api_server`."""
    node._webui_url = ""


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens or answers: Ray itself would try for many minutes.

    Raises:
        UserError: nothing listens.
        DiffitError: something accepts connections and does not answer.
    """
    url = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if url.port is None:
            return
        where = (url.hostname or "", url.port)
        retry(f"the Ray cluster at {address}", lambda e: isinstance(e, _NoGreetingError))(
            lambda: _greet(where)
        )
    except _NoGreetingError as error:
        raise DiffitError(
            f"something at {address} accepts connections, but has not answered for "
            f"{limit_s():g} s; restart that Ray cluster, or fix --address"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(_unreachable(address, error)) from error


class _NoGreetingError(Exception):
    """A server does not answer."""


def _greet(where: tuple[str, int]) -> None:
    """Begin to speak gRPC and wait for any answer: settings, an error, or the end."""
    with socket.create_connection(where, CONNECT_TIMEOUT_S) as connection:
        connection.settimeout(attempt_s())
        connection.sendall(_HTTP2_GREETING)
        try:
            connection.recv(1)
        except TimeoutError as error:
            raise _NoGreetingError("no answer") from error
        except ConnectionError:
            return  # an answer, too; Ray says what is wrong


def _unreachable(address: str, error: Exception) -> str:
    return (
        f"could not reach a Ray cluster at {address!r}: {error}; start one with `ray start "
        "--head`, or omit --address to use this machine"
    )


def require(cpus: float, gpus: float, purpose: str, wait_s: float = 0.0) -> None:
    """Refuse work that the connected cluster cannot schedule, or wait for the cluster to grow.

    Args:
        wait_s: for how long to wait for an autoscaler, which is told what is needed.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than `purpose` needs.
    """
    missing = missing_resources(cpus, gpus)
    if missing and wait_s:
        missing = _wait_for_growth(cpus, gpus, purpose, missing, wait_s)
    if missing:
        raise UserError(
            f"{purpose} needs {missing}; lower the resources under `scaling`, such as "
            "scaling.workers=1, pass the --address of a larger cluster, or, if this one can grow, "
            "set scaling.wait_s"
        )


def _wait_for_growth(cpus: float, gpus: float, purpose: str, missing: str, wait_s: float) -> str:
    """Ask the autoscaler for resources and wait; what is still missing, in words."""
    import ray
    from ray.autoscaler.sdk import request_resources

    say(f"waiting up to {wait_s:g} s for nodes: {purpose} needs {missing}")
    started_s = time.monotonic()
    each = {"GPU": 1.0, "CPU": cpus / gpus} if gpus else {"CPU": 1.0}
    request_resources(bundles=[each] * math.ceil(gpus or cpus))
    try:
        while missing and time.monotonic() - started_s < wait_s:
            time.sleep(GROWTH_POLL_S)
            missing = missing_resources(cpus, gpus)
    finally:
        if ray.is_initialized():
            request_resources(bundles=[])
    if not missing:
        say(f"the cluster has grown: {purpose} goes on after {time.monotonic() - started_s:.0f} s")
    return missing


def missing_resources(cpus: float, gpus: float) -> str:
    """What the connected cluster has too little of, in words; empty if it has enough."""
    import ray

    resources = ray.cluster_resources()
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        present = resources.get(kind, 0)
        if needed > present:
            return f"{needed:g} {kind}s, but the Ray cluster has {present:g}"
    return ""


def gpus_of_this_node() -> float | None:
    """GPUs that Ray schedules on this node; None without a Ray session."""
    import ray

    if not ray.is_initialized():
        return None
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    return float(node["Resources"].get("GPU", 0))


def is_private() -> bool:
    """Whether the connected cluster was started by this process, and ends with it."""
    import ray

    node = ray._private.worker._global_node
    return node is not None and bool(node.head)


def has_state_api() -> bool:
    """Whether the connected cluster tells the state of its actors: a private one does not."""
    import ray

    return bool(ray._private.worker.get_dashboard_url())


def task_attempt() -> int:
    """How often the current task was started before and its process died; 0 outside of a task."""
    import ray

    if not ray.is_initialized():
        return 0
    # There is no public option: the runtime context has the task's id only.
    return int(ray._private.worker.global_worker.core_worker.get_current_task_attempt_number())


def on_every_node(call: Callable[..., T], *args: Any) -> list[T]:
    """Results of a call on each live node of the connected cluster.

    Args:
        call: called with `args` and the node's address.

    Raises:
        DiffitError: a node did not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    remote = ray.remote(num_cpus=0, max_retries=0)(call)
    calls = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*args, node["NodeManagerAddress"])
        for node in nodes
    ]
    try:
        return list(ray.get(calls, timeout=NODE_TIMEOUT_S))
    except (ray.exceptions.RayError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise DiffitError(f"a node of the cluster did not answer: {reason[0]}") from error
