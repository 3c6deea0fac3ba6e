"""Processes that neither work nor end: training goes on without them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from diffit_train.config import dump_recipe
from diffit_train.data.encode import encode
from diffit_train.data.shards import latents_url
from diffit_train.evaluation import runner
from diffit_train.hang import tasks
from diffit_train.hang.processes import (
    Process,
    end_processes,
    kill_here,
    limit_s,
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


def test_a_task_may_take_a_multiple_of_what_others_took() -> None:
    assert limit_s(300.0, []) == 1200.0
    assert limit_s(300.0, [1.0, 2.0, 3.0]) == 300.0
    assert limit_s(300.0, [50.0, 40.0, 900.0]) == 500.0


def _process(pid: int) -> Process:
    return Process(node="node", host="host", pid=pid, started=0.0, stacks=-1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time on the board's clock, in its only element."""
    now = [0.0]
    monkeypatch.setattr(tasks.time, "monotonic", lambda: now[0])
    return now


def test_a_task_that_takes_far_longer_than_others_hangs(clock: list[float]) -> None:
    board = tasks.Board()
    for number in range(3):
        board.begin(f"done {number}", "encoding", f"shard {number}", _process(1))
        clock[0] += 4.0
        board.end(f"done {number}")
    assert board.begin("slow", "encoding", "shard 3", _process(1)) == 0
    clock[0] += 5.0
    board.begin("first", "reading", "shard 4", _process(2))  # the first of its kind
    clock[0] += 34.0  # of ten times the median
    assert board.take_hanging(10.0) == []
    clock[0] += 2.0
    ((task, taken_s),) = board.take_hanging(10.0)
    assert (task.process.pid, taken_s) == (1, 41.0)
    assert task.said(taken_s) == "process 1 on host has been encoding shard 3 for 41 s"
    clock[0] += 5.0  # four times the limit
    assert [task.process.pid for task, _ in board.take_hanging(10.0)] == [2]
    assert board.begin("again", "encoding", "shard 3", _process(3)) == 1
    assert board.begin("other", "encoding", "shard 5", _process(4)) == 0


def test_a_task_begun_again_replaces_that_of_a_dead_process(clock: list[float]) -> None:
    board = tasks.Board()
    board.begin("dead", "reading", "shard 1", _process(1))
    clock[0] += 30.0
    board.begin("alive", "reading", "shard 1", _process(2))
    clock[0] += 20.0
    assert board.take_hanging(10.0) == []


def test_idle_processes_are_taken_once_if_nothing_is_begun(clock: list[float]) -> None:
    board = tasks.Board()
    board.begin("a", "encoding", "shard 1", _process(1))
    clock[0] += 2.0
    board.end("a")
    board.end("a")  # twice, as after a kill
    clock[0] += 19.0
    assert board.take_hanging(10.0) == []  # twenty seconds are ten times the median
    clock[0] += 2.0
    ((task, idle_s),) = board.take_hanging(10.0)
    assert (task.process.pid, idle_s) == (1, 21.0)
    assert board.take_hanging(10.0) == []


@pytest.mark.usefixtures("ray_session")
def test_a_task_that_raises_is_off_the_board() -> None:
    board = tasks.new_board()
    with pytest.raises(ValueError, match="bad image"), tasks.listed(board, "reading", "shard 1"):
        raise ValueError("bad image")
    with tasks.listed(board, "reading", "shard 2"):
        names = board.__ray_call__.remote(lambda self: [t.name for t in self.tasks.values()])
        assert ray.get(names) == ["shard 2"]
    ray.kill(board)


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


def _introduced(pid: int) -> bool:
    """Whether a process has begun its first task, rather than to import."""
    with contextlib.suppress(OSError):
        files = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        return any(file.startswith(f"{tempfile.gettempdir()}/#") for file in files)
    return False


def _named(prefix: str) -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(prefix) and _introduced(process.pid):
                found.add(process.pid)
    return found


def _suspend_first(prefix: str, ended: threading.Event, stopped: list[int]) -> None:
    """Stop the first process whose name begins so, of those that do not have it yet."""
    former = _named(prefix)
    while not ended.wait(0.01):
        for pid in _named(prefix) - former:
            time.sleep(0.03)  # a process that has not listed its task yet is not noticed
            psutil.Process(pid).suspend()
            stopped.append(pid)
            return


@contextlib.contextmanager
def _suspending(prefix: str) -> Iterator[list[int]]:
    ended, stopped = threading.Event(), list[int]()
    thread = threading.Thread(target=_suspend_first, args=(prefix, ended, stopped))
    thread.start()
    try:
        yield stopped
    finally:
        ended.set()
        thread.join()
        for pid in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_an_evaluation_replaces_a_stopped_actor(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(trained, root)
    recipe = tiny_recipe(root, "scaling.hang_s=4", "evaluate.samples=48")
    with _suspending("ray::EvaluationActor.c") as stopped:
        (found,) = runner.evaluate([runner.Request(recipe, "tiny", 12)])
    assert stopped, "no actor was caught at work"
    assert "s without a result; replacing it" in capfd.readouterr().err
    assert (root / "stacks").is_dir()
    other = tiny_recipe(trained, "evaluate.samples=48")
    (undisturbed,) = runner.evaluate([runner.Request(other, "tiny", 12)])
    assert found.metrics == undisturbed.metrics


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("prefix", ["ray::MapWorker", "ray::Map(_read_listed"])
def test_an_encode_replaces_a_stopped_process(
    encoded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], prefix: str
) -> None:
    for name in ("images", "autoencoders"):
        shutil.copytree(encoded / name, tmp_path / name)
    recipe = tiny_recipe(tmp_path, "scaling.hang_s=2")
    with _suspending(prefix) as stopped:
        found = encode(recipe)
    assert stopped, "no process was caught at work"
    assert "; replacing it" in capfd.readouterr().err
    mine, theirs = Path(latents_url(recipe)), Path(latents_url(tiny_recipe(encoded)))
    for entry in found.shards:
        assert (mine / entry.name).read_bytes() == (theirs / entry.name).read_bytes()
