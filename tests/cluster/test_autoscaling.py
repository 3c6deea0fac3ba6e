"""Training on a cluster that grows from no worker, and shrinks again: Ray's fake autoscaler."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from diffit_train.config import dump_recipe
from diffit_train.runs.checkpoints import Checkpoints
from tests.cluster.machines import REPOSITORY, Network, why_not
from tests.conftest import tiny_recipe
from tests.training.test_train import _copy


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_training_waits_for_nodes_and_gives_them_back(encoded: Path) -> None:
    with Network() as network:
        network.reserve("alone")
        machine = network.add("alone")
        root = machine.folder / "project"
        root.mkdir()
        _copy(encoded, root)
        recipe = root / "recipe.yaml"
        changes = ("scaling.workers=2", "scaling.node_wait_timeout_s=120")
        recipe.write_text(dump_recipe(tiny_recipe(root, *changes)))
        command = [sys.executable, "-m", "tests.cluster.autoscaling", str(recipe)]
        done = machine.run(command, {"PYTHONPATH": str(REPOSITORY)}, timeout_s=800)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        seen = json.loads(done.stdout.splitlines()[-1])
        print(seen)
        assert Checkpoints(str(root / "runs" / "grown")).steps[-1] == 12
    assert seen["before"] == 0
    assert seen["nodes"] == seen["trains_on"] == 2
    assert seen["status"] == 0
    waits = "waiting up to 120 s for nodes: training needs 2 CPUs, but the Ray cluster has 0"
    assert waits in seen["said"]
