"""What a training worker does before torch's process group exists."""

from __future__ import annotations

import os

import psutil
import pytest
import ray

from diffit_train.training.worker import choose_interface


def _chosen(named: str) -> tuple[str, str]:
    """In a worker: the interface that gloo is told, and the node's address."""
    if named:
        os.environ["GLOO_SOCKET_IFNAME"] = named
    else:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
    choose_interface()
    return os.environ["GLOO_SOCKET_IFNAME"], ray.util.get_node_ip_address()


@pytest.mark.usefixtures("ray_session")
def test_gloo_uses_the_interface_of_the_node_unless_told_otherwise() -> None:
    remote = ray.remote(num_cpus=0)(_chosen)
    interface, address = ray.get(remote.remote(""))
    assert address in [found.address for found in psutil.net_if_addrs()[interface]]
    assert ray.get(remote.remote("mine"))[0] == "mine"
