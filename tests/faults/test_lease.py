"""Two commands of one run: refused, waited for, and one that is stopped and continued later."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

import psutil
import pytest

from diffit_train.config import dump_recipe
from diffit_train.runs.checkpoints import Checkpoints
from tests.conftest import tiny_recipe
from tests.faults.driver import Driver
from tests.training.test_train import _copy, _losses, _no_doubled_points

STEPS = ("train.steps=1500", "train.checkpoint_every=50", "train.log_every=10")
STEPS += ("train.keep_checkpoints=2",)


def _hashes(run: Path) -> dict[str, str]:
    files = [path for path in run.rglob("*") if path.is_file() and "lease" not in path.parts]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def _everything_of(driver: Driver) -> list[psutil.Process]:
    command = psutil.Process(driver.process.pid)
    return [command, *command.children(recursive=True)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_command_that_wakes_up_late_changes_nothing(encoded: Path, tmp_path: Path) -> None:
    _copy(encoded, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(tmp_path, *STEPS)))
    run = tmp_path / "runs" / "killed"
    late, second, third = (Driver(recipe, "killed") for _ in range(3))
    late.start()
    late.wait(lambda: (run / "lease").exists())
    third.start()
    assert third.process.wait(timeout=120) == 2
    assert third.said(f"process {late.process.pid} on ")
    assert third.said("diffit train --wait")

    late.wait(lambda: Checkpoints(str(run)).steps[-1:] >= [100])
    stopped = _everything_of(late)
    for process in stopped:
        process.suspend()
    assert Checkpoints(str(run)).steps[-1] < 1500, "the run ended before it could be stopped"
    try:
        second.start()
        assert second.process.wait(timeout=600) == 0, [line.text for line in second.lines[-9:]]
        assert second.said("which holds the run, to answer")
        assert Checkpoints(str(run)).steps[-1] == 1500
        before, losses = _hashes(run), _losses(tmp_path, "killed")
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
    assert late.process.wait(timeout=300) == 1
    assert late.said("has taken over")
    time.sleep(5)  # what its workers would still write
    assert _hashes(run) == before
    assert [step for step, _ in losses] == list(range(10, 1501, 10))
    _no_doubled_points(tmp_path, losses)
