"""The private cluster on this machine: who can reach it."""

from __future__ import annotations

import json
import subprocess
import sys

# In its own process, because the tests of a process share one Ray session.
LISTENERS = """
import json, psutil, ray
from diffit_train.ray_session import connected
with connected():
    ray.get(ray.remote(lambda: None).remote())
    me = psutil.Process()
    found = {
        f"{process.name()} {socket.laddr.ip}"
        for process in (me, *me.children(recursive=True))
        for socket in process.net_connections("tcp")
        if socket.status == psutil.CONN_LISTEN
    }
print(json.dumps(sorted(found)))
"""


def test_a_private_cluster_listens_on_loopback_only() -> None:
    command = [sys.executable, "-c", LISTENERS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    listeners = [line.rsplit(" ", 1) for line in json.loads(done.stdout.splitlines()[-1])]
    assert {"gcs_server", "raylet"} <= {name for name, _ in listeners}
    assert {address for _, address in listeners} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
