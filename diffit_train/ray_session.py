"""Connect to Ray: a cluster by its address, or one of this machine, started and ended here."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from urllib.parse import urlsplit

from diffit_train.errors import UserError

# Usage reports would leave the machine; set to 1 by whoever wants to send them.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# Without it Ray would join any cluster that happens to run on this machine.
NEW_CLUSTER = "local"
KNOCK_S = 10.0
# Environment of processes that compute on a CPU. glibc gives each freed block above 32 MiB back to
# the kernel and has it zeroed again page by page: in a loop over an autoencoder's activations a
# fifth of the time, in a ZeRO step of 108M parameters a third. Here what a process has freed stays
# with it. They must be set before it starts.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_ARENA_MAX": "1",
}


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """A Ray session for the block.

    Args:
        address: `host:port`, `ray://host:port` or `auto`; None means the cluster that
            RAY_ADDRESS names, as inside a Ray job, or else a new one on this machine.

    Raises:
        UserError: no cluster answers at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or NEW_CLUSTER
    _knock(address)
    try:
        with _on_loopback() if address == NEW_CLUSTER else nullcontext():
            ray.init(
                address=address,
                include_dashboard=False if address == NEW_CLUSTER else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError) as error:
        raise UserError(_no_answer(address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a cluster that is started within listen on 127.0.0.1 only.

    Else every process of it listens on all interfaces. There is no public way: Ray turns
    `_node_ip_address="127.0.0.1"` into the address of the network card. This switch makes it keep
    to loopback, as it does on macOS; without the switch, in a later Ray, nothing changes.
    """
    from ray._private import ray_constants

    switch = "ENABLE_RAY_CLUSTER"
    before = getattr(ray_constants, switch, True)
    setattr(ray_constants, switch, False)
    try:
        yield
    finally:
        setattr(ray_constants, switch, before)


def _knock(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try for many minutes."""
    place = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if place.port is not None:
            socket.create_connection((place.hostname, place.port), KNOCK_S).close()
    except (OSError, ValueError) as error:
        raise UserError(_no_answer(address, error)) from error


def _no_answer(address: str, error: Exception) -> str:
    return (
        f"no Ray cluster answers at {address!r}: {error}; start one with `ray start --head`, "
        "or leave --address out to use this machine"
    )


def require(cpus: float, gpus: float, purpose: str) -> None:
    """Refuse work that the connected cluster could never place.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than `purpose` takes.
    """
    import ray

    resources = ray.cluster_resources()
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        present = resources.get(kind, 0)
        if needed > present:
            raise UserError(
                f"{purpose} needs {needed:g} {kind}s, but the Ray cluster has {present:g}; "
                "lower the amounts under `scaling`, as scaling.workers=1, or give a larger "
                "cluster by --address"
            )
