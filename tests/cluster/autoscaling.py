"""`diffit train` on a cluster that starts with no worker; run by `test_autoscaling`.

    python -m tests.cluster.autoscaling RECIPE

Only on a machine of its own, whose Ray and nodes end with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray

from tests.cluster.machines import wait_until
from tests.faults.driver import Driver

NODES, IDLE_S, TRAINED_S = 2, 12, 400


def configuration() -> dict[str, Any]:
    """Of Ray's fake provider, whose nodes are raylets of this machine.

    `ray.cluster_utils.AutoscalingCluster` would read it from a file that Ray's wheels lack.
    """
    worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": NODES}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    lists = ["cluster_synced_files", "initialization_commands", "setup_commands"]
    lists += ["head_setup_commands", "worker_setup_commands", "head_start_ray_commands"]
    lists += ["worker_start_ray_commands", "rsync_exclude", "rsync_filter"]
    return {
        "cluster_name": "fake",
        "max_workers": NODES,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,  # the nodes share an address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"worker": worker, "ray.head.default": head},
        "head_node_type": "ray.head.default",
        "head_node": {},
        "worker_nodes": {},
        "docker": {},
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }


def start_ray() -> None:
    """A head without CPUs, with the autoscaler."""
    Path("/tmp/autoscaling.json").write_text(json.dumps(configuration()))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=0"]
    command += ["--autoscaling-config=/tmp/autoscaling.json", "--disable-usage-stats"]
    environment = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=sys.stderr)


def workers() -> int:
    """Live nodes other than the head."""
    return sum(node["Alive"] for node in ray.nodes()) - 1


def main() -> None:
    """Train; print what was seen as JSON."""
    start_ray()
    ray.init("auto", log_to_driver=False)
    seen = {"before": workers()}
    address = ray.get_runtime_context().gcs_address
    driver = Driver(Path(sys.argv[1]), "grown", address)
    begun_s = time.monotonic()
    driver.start()
    begun = driver.wait_begun(0.0)
    seen |= {"trains_on": begun.workers, "nodes": workers()}
    seen["grew_in_s"] = round(begun.at_s - begun_s)
    seen["status"] = driver.process.wait(timeout=TRAINED_S)
    ended_s = time.monotonic()
    wait_until("idle nodes are given back", lambda: workers() == 0, within_s=120)
    seen["given_back_in_s"] = round(time.monotonic() - ended_s)
    seen["said"] = [line.text for line in driver.lines]
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
