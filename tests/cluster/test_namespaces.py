"""The run in network namespaces, from beginning to end; and that it leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cluster import machines, services

REASON = services.why_not() or machines.why_not()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_cluster_loses_a_node_and_trains_on() -> None:
    command = [sys.executable, "-m", "tests.cluster"]
    with subprocess.Popen(command, cwd=machines.REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = process.stdout.read().decode()
    print(said)
    assert process.returncode == 0
    assert not [name for name in machines.namespaces() if f"-{process.pid}-" in name]
