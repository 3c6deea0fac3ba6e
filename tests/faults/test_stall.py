"""Ranks that make no progress: they leave their stack traces and exit, and training goes on."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from diffit_train.config import dump_recipe
from diffit_train.runs.checkpoints import Checkpoints
from diffit_train.training import stall
from diffit_train.training.stall import StallGuard
from tests.conftest import tiny_recipe, train
from tests.faults.driver import Driver
from tests.training.test_train import _copy, _losses, _no_doubled_points

STEPS = ("train.steps=600", "train.checkpoint_every=40", "train.log_every=20")
STEPS += ("train.keep_checkpoints=3",)
STALLED = """
import sys, time
from diffit_train.training.stall import StallGuard, exit_with_stacks

def stuck():
    time.sleep(600)

guard = StallGuard(0.2, lambda what, stacks: exit_with_stacks(sys.argv[1], 3, what + stacks))
guard.doing("forward of step 7")
stuck()
"""


def test_a_rank_that_stalls_exits_and_leaves_its_stack_traces(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STALLED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == stall.EXIT_STATUS
    (file,) = (tmp_path / stall.STACKS).iterdir()
    assert file.name.endswith("-rank3.txt")
    for text in (file.read_text(), done.stderr):
        assert "since forward of step 7" in text
        assert "in stuck" in text


def test_progress_and_slow_phases_are_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the test turns: the guard looks at it once a tick."""
    now_s, stalls = [0.0], queue.Queue[str]()
    ticks, looked = queue.Queue[float](), queue.Queue[None]()

    class Ticks(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            looked.put(None)
            now_s[0] += ticks.get(timeout=60)
            return False

    monkeypatch.setattr(stall, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    fake = SimpleNamespace(Event=Ticks, Thread=threading.Thread)
    monkeypatch.setattr(stall, "threading", fake)
    guard = StallGuard(100.0, lambda what, _: stalls.put(what))

    def tick(seconds: float) -> None:
        ticks.put(seconds)
        looked.get(timeout=60)

    looked.get(timeout=60)
    tick(399.0)  # starting is slow
    guard.doing("forward of step 1")
    tick(99.0)
    guard.doing("backward of step 1")
    tick(99.0)
    assert stalls.empty()
    ticks.put(2.0)
    assert stalls.get(timeout=60) == "no progress for 101 s since backward of step 1"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_session")
def test_training_replaces_a_stopped_rank(encoded: Path, tmp_path: Path) -> None:
    train(tiny_recipe(encoded, *STEPS), "whole")
    _copy(encoded, tmp_path)
    changes = (*STEPS, "scaling.workers=2", "scaling.stall_timeout_s=10")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe(tmp_path, *changes)))
    run, driver = tmp_path / "runs" / "killed", Driver(tmp_path / "recipe.yaml", "killed")
    driver.start()
    driver.wait(lambda: run.exists() and Checkpoints(str(run)).steps[-1:] >= [80])
    for worker in psutil.Process(driver.process.pid).children(recursive=True):
        if worker.name().startswith("ray::RayTrainW"):
            worker.send_signal(signal.SIGSTOP)
            break
    stopped_s = time.monotonic()
    begun = driver.wait_begun(stopped_s, 120)
    assert begun.step >= 80
    assert driver.said("made no progress for 1")
    assert driver.said("(failure 1 of 3 allowed since the checkpoint")
    assert driver.process.wait(timeout=300) == 0
    assert not worker.is_running()
    (file,) = (run / "stacks").iterdir()
    assert "training/trainer.py" in file.read_text()  # the other rank, in a collective
    losses = _losses(tmp_path, "killed")
    for (step, mine), (other, theirs) in zip(losses, _losses(encoded, "whole"), strict=True):
        assert step == other
        assert mine == pytest.approx(theirs, rel=1e-4)
    _no_doubled_points(tmp_path, losses)
    print(f"training went on {begun.at_s - stopped_s:.0f} s after a rank was stopped")
