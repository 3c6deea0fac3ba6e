"""Faults on a cluster of several raylets: announced and sudden node losses, SIGTERM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffit_train.config import dump_recipe
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints
from diffit_train.training.driver import STOPPED
from tests.conftest import tiny_recipe, train
from tests.faults.driver import Driver, Nodes
from tests.training.test_train import _copy, _losses, _no_doubled_points

LONG = ("train.steps=2000", "train.checkpoint_every=100", "train.log_every=50")
LONG += ("train.lr=1e-4", "train.keep_checkpoints=2")
ELASTIC = ("scaling.workers=1..2", "scaling.resize_check_s=3", "scaling.max_failures=5")
# A node takes about 20 s to join, in which a fast machine trains 4,000 steps.
LONGER = (*LONG, "train.steps=10_000", "train.checkpoint_every=500")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_nodes_leave_and_join(encoded: Path, tmp_path: Path) -> None:
    _copy(encoded, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(tmp_path, *LONGER, *ELASTIC)))
    script = [sys.executable, "-m", "tests.faults.test_cluster", str(recipe)]
    subprocess.run(script, check=True, timeout=900)
    run = tmp_path / "runs" / "elastic"
    assert Checkpoints(str(run)).steps == [0, 9500, 10_000]
    assert all(Checkpoint(str(run), step).find_corruption() is None for step in (0, 9500, 10_000))
    train(tiny_recipe(encoded, *LONGER), "undisturbed")
    mine, theirs = _losses(tmp_path, "elastic"), _losses(encoded, "undisturbed")
    assert [step for step, _ in mine] == [step for step, _ in theirs]
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-3)
    _no_doubled_points(tmp_path, theirs, "elastic")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_session")
def test_what_a_lost_node_costs(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _copy(encoded, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(tmp_path)))
    script = [sys.executable, "-m", "tests.faults.lost_node", "--root", str(tmp_path)]
    script += ["--recipe", str(recipe)]
    result = subprocess.run(script, check=True, timeout=1500, stdout=subprocess.PIPE, text=True)
    with capsys.disabled():
        print(f"\n{result.stdout}")
    fixed, left, grown = json.loads(result.stdout.splitlines()[-1])
    assert [cost["workers"] for cost in (fixed, left, grown)] == [2, 1, 2]
    # The newest checkpoint may not have been committed yet.
    assert all(0 <= cost["at_step"] - cost["from_step"] < 400 for cost in (fixed, left))
    # It saved, and took no step after that.
    assert grown["from_step"] >= grown["at_step"]


def _disturb(recipe: Path) -> None:
    """In its own process: a second cluster cannot be created while connected to one."""
    with Nodes(2) as nodes:
        driver = Driver(recipe, "elastic", nodes.address)
        driver.start()
        first = driver.wait_begun(0.0)
        assert (first.step, first.workers) == (0, 2)
        driver.wait(lambda: driver.stepped(first.at_s))

        nodes.announce_end(nodes.nodes[0], 20.0)
        driver.wait(lambda: driver.said("Node preemption announced; checkpoint saved at step"))
        told_s = time.monotonic()
        nodes.kill(nodes.nodes[0])
        alone = driver.wait_begun(told_s)
        assert alone.workers == 1
        assert alone.step > 0

        nodes.add()
        joined = driver.wait_begun(alone.at_s)
        assert joined.workers == 2

        nodes.kill(nodes.nodes[1])
        left = driver.wait_begun(joined.at_s)
        assert left.workers == 1

        assert driver.end(signal.SIGTERM) == STOPPED
        assert driver.said("rerun the same command to resume")
        stopped = Checkpoints(str(recipe.parent / "runs" / "elastic")).steps[-1]
        nodes.add()
        driver.start()
        again = driver.wait_begun(left.at_s)
        assert again.step == stopped
        driver.process.wait(timeout=600)
        assert driver.process.returncode == 0, json.dumps([line.text for line in driver.lines])


if __name__ == "__main__":
    _disturb(Path(sys.argv[1]))
