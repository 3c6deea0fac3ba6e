"""Connect to Ray: an existing cluster, or a private one on this machine for the block."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from diffit_train.errors import UserError, first_line
from diffit_train.progress import say

# Without it, Ray would join any cluster that happens to run on this machine.
NEW_CLUSTER = "local"
# What Ray asks of everyone who connects to a cluster that it started for itself.
TOKEN_FILE = Path.home() / ".ray" / "auth_token"
CONNECT_TIMEOUT_S = 10.0
# Of Ray at a cluster that does not answer; each takes 40 s, and its own default is 20.
RAY_TRIES = "2"
# Between looks at a cluster that is to grow.
GROWTH_POLL_S = 5.0
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

    Args:
        address: `host:port`, `ray://host:port` or `auto`; None for RAY_ADDRESS (set inside a Ray
            job), or else a new cluster on this machine, which Ray protects by a token.

    Raises:
        UserError: no cluster is reachable at the address.
    """
    # No usage reports leave the machine; set to 1 to send them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or NEW_CLUSTER
    private = address == NEW_CLUSTER
    say(
        "Starting Ray on this machine" if private else f"Connecting to the Ray cluster at {address}"
    )
    if not private:
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", RAY_TRIES)
    try:
        _require_listener(address)
        context = ray.init(
            address=address,
            include_dashboard=False if private else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"could not reach a Ray cluster at {address!r}: {first_line(error)}; start one with "
            "`ray start`, fix --address, or omit it to use this machine"
        ) from error
    if private:
        # Ray lets everybody write to logs, sockets and packages, and read a token that it makes.
        Path(context.address_info["session_dir"]).chmod(0o700)
        if TOKEN_FILE.exists():
            TOKEN_FILE.chmod(0o600)
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Refuse an address where nothing listens; Ray would try for longer.

    Raises:
        OSError: nothing listens.
        ValueError: the port is not a number.
    """
    url = urlsplit(address if "://" in address else f"ray://{address}")
    if url.port is not None:
        socket.create_connection((url.hostname or "", url.port), CONNECT_TIMEOUT_S).close()


def require(cpus: float, gpus: float, purpose: str, wait_s: float = 0.0) -> None:
    """Refuse work that the connected cluster cannot schedule, or wait for the cluster to grow.

    Args:
        wait_s: for how long to wait for an autoscaler, which learns what is needed.

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
            "set scaling.node_wait_timeout_s"
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
