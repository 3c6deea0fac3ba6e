"""`diffit train` on a cluster that starts with no worker; run by `test_autoscaling`.

    python -m tests.cluster.autoscaling RECIPE

Only on a machine of its own: Ray's cluster for tests stops every Ray that it sees.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import AutoscalingCluster

from tests.cluster.machines import wait_until
from tests.faults.driver import Driver

NODES, IDLE_S, TRAINED_S = 2, 12, 400


def workers() -> int:
    """Live nodes other than the head."""
    return sum(node["Alive"] for node in ray.nodes()) - 1


def main() -> None:
    """Train; print what was seen as JSON."""
    node = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": NODES}
    cluster = AutoscalingCluster({"CPU": 0}, {"worker": node}, idle_timeout_minutes=IDLE_S / 60)
    cluster.start()
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
