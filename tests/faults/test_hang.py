"""Processes that neither work nor end: training goes on without them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from diffit_train.config import dump_recipe
from diffit_train.hang.processes import (
    end_processes,
    kill_here,
    this_process,
)
from diffit_train.runs.checkpoints import committed_steps
from diffit_train.training.driver import train
from diffit_train.training.status import Rank
from diffit_train.training.watchdog import stalled_s
from tests.conftest import tiny_recipe
from tests.faults.driver import Driver
from tests.training.test_train import _copy, _losses, _no_doubled_points

STEPS = ("train.steps=600", "train.checkpoint_every=40", "train.log_every=20")
STEPS += ("train.keep_checkpoints=3",)


def _rank(idle_s: float, *, slow: bool = False, left: bool = False) -> Rank:
    return Rank(this_process(), 0, "forward of step 3", slow, idle_s, left)


@pytest.mark.usefixtures("ray_session")
def test_ranks_hang_if_none_of_those_at_work_makes_progress() -> None:
    assert stalled_s([], 10.0) is None
    assert stalled_s([_rank(99.0, left=True)], 10.0) is None
    assert stalled_s([_rank(99.0), _rank(9.0)], 10.0) is None
    assert stalled_s([_rank(99.0), _rank(11.0)], 10.0) == 11.0
    assert stalled_s([_rank(99.0), _rank(1.0, left=True)], 10.0) == 99.0
    assert stalled_s([_rank(39.0), _rank(39.0, slow=True)], 10.0) is None
    assert stalled_s([_rank(41.0), _rank(41.0, slow=True)], 10.0) == 41.0


class Sleeper:
    """An actor."""

    def introduce(self) -> Any:
        """Its process."""
        return this_process()

    def sleep_here(self) -> None:
        """Hang."""
        time.sleep(600)

    def wait_here(self, pid: int) -> None:
        """Hang until another process has ended, as in a collective, and end then."""
        other = psutil.Process(pid)
        while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        os._exit(1)


@pytest.mark.usefixtures("ray_session")
def test_a_process_is_ended_with_its_stack_traces_or_its_state() -> None:
    remote: Any = ray.remote(num_cpus=0)(Sleeper)
    working, stopped = remote.remote(), remote.remote()
    processes = ray.get([working.introduce.remote(), stopped.introduce.remote()])
    hanging = working.sleep_here.remote()
    psutil.Process(processes[1].pid).suspend()
    time.sleep(0.5)
    traces, state = end_processes(processes)
    assert "in sleep_here" in traces.text
    assert "'stopped'" in state.text
    assert not traces.of_itself
    assert not state.of_itself
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(hanging, timeout=60)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process.pid).wait(30)  # a killed process takes a moment to end
    assert end_processes(processes) == [("it has ended", True)] * 2
    # Another process may have got the number since.
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert kill_here(processes[0]._replace(pid=other.pid)) == "it has ended"
    assert other.poll() is None
    other.kill()


@pytest.mark.usefixtures("ray_session")
def test_a_process_that_ends_with_another_leaves_its_stack_traces() -> None:
    remote: Any = ray.remote(num_cpus=0)(Sleeper)
    stopped, waiting = remote.remote(), remote.remote()
    processes = ray.get([stopped.introduce.remote(), waiting.introduce.remote()])
    waiting.wait_here.remote(processes[0].pid)
    psutil.Process(processes[0].pid).suspend()
    time.sleep(0.5)
    state, traces = end_processes(processes)
    assert "'stopped'" in state.text
    assert "in wait_here" in traces.text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_training_replaces_a_stopped_rank(encoded: Path, tmp_path: Path) -> None:
    train(tiny_recipe(encoded, *STEPS), "whole")
    _copy(encoded, tmp_path)
    changes = (*STEPS, "scaling.workers=2", "scaling.hang_s=10")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe(tmp_path, *changes)))
    run, driver = tmp_path / "runs" / "killed", Driver(tmp_path / "recipe.yaml", "killed")
    driver.start()
    driver.wait(lambda: run.exists() and committed_steps(str(run))[-1:] >= [80])
    for worker in psutil.Process(driver.process.pid).children(recursive=True):
        if worker.name().startswith("ray::RayTrainW"):
            worker.send_signal(signal.SIGSTOP)
            break
    stopped_s = time.monotonic()
    begun = driver.wait_begun(stopped_s, 120)
    assert begun.step >= 80
    assert driver.said("Ended the training workers: no rank has made progress for 1")
    assert driver.said("(failure 1 of 3 allowed since the checkpoint")
    assert driver.process.wait(timeout=300) == 0
    (file,) = (run / "stacks").iterdir()
    text = file.read_text()
    assert "its state is 'stopped'" in text
    assert "training/loop.py" in text  # the other rank, in a collective
    losses = _losses(tmp_path, "killed")
    for (step, mine), (other, theirs) in zip(losses, _losses(encoded, "whole"), strict=True):
        assert step == other
        assert mine == pytest.approx(theirs, rel=1e-4)
    _no_doubled_points(tmp_path, losses)
    print(f"training went on {begun.at_s - stopped_s:.0f} s after a rank was stopped")
