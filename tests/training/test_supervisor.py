"""What ends a run, what it waits for, and that it saves before a resize; with Ray's own states."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from diffit_train.config.scaling import Scaling
from diffit_train.errors import DiffitError, UserError
from diffit_train.training import driver, ray_train, supervisor
from diffit_train.training.status import TrainingStatus
from diffit_train.training.supervisor import Supervisor
from tests.conftest import tiny_recipe

pytestmark = pytest.mark.usefixtures("ray_session")

DIED = WorkerGroupError("boom", {1: RuntimeError("Traceback …\nValueError: boom")})
START_FAILED = ControllerError(WorkerGroupStartupFailedError("a worker did not start"))
NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))


@pytest.fixture
def status() -> Iterator[Any]:
    """The actor that driver, workers and supervisor share."""
    actor = TrainingStatus.remote()  # type: ignore[attr-defined]
    yield actor
    ray.kill(actor)


def _lines(status: Any) -> list[str]:
    return list(ray.get(status.read.remote(0))[1])


def _fail(watched: Supervisor, error: BaseException) -> None:
    """Workers run, fail, and are placed again."""
    failed = RestartingState(error)
    watched.after_controller_state_update(RunningState(), failed)
    watched.after_controller_state_update(failed, SchedulingState(None))
    watched.after_controller_state_update(SchedulingState(None), RunningState())


def test_failures_without_a_new_checkpoint_are_limited(status: Any) -> None:
    watched = Supervisor(status, Scaling(max_failures=2), newest_checkpoint=100)
    for newest in (100, 200, 300):
        ray.get(status.saved.remote(newest))
        _fail(watched, DIED)
        _fail(watched, DIED)
    ray.get(status.saved.remote(250))  # written again after a rollback: no progress
    with pytest.raises(DiffitError, match=r"ValueError: boom \(failures .*step 300: 3; .* is 2\)"):
        _fail(watched, DIED)


def test_workers_that_do_not_start_are_failures(status: Any) -> None:
    watched = Supervisor(status, Scaling(max_failures=0), newest_checkpoint=0)
    with pytest.raises(DiffitError, match="a worker did not start"):
        watched.after_controller_state_update(
            SchedulingState(None), ReschedulingState(START_FAILED)
        )


class _Killer(Supervisor, WorkerGroupCallback):
    """Kills a worker of the first group just before it is handed the training function.

    Args:
        noticed: whether it is noticed before that.
    """

    def __init__(self, *args: Any, mark: Path, noticed: bool) -> None:
        super().__init__(*args)
        self.mark, self.noticed = mark, noticed

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray Train."""
        if not self.mark.exists():
            self.mark.touch()
            os.kill(worker_group.get_workers()[0].metadata.pid, signal.SIGKILL)
            time.sleep(1.0)
            if self.noticed:
                worker_group.execute(os.getpid)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("noticed", [False, True])
def test_a_worker_that_dies_before_it_begins_is_replaced(
    encoded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    noticed: bool,
) -> None:
    shutil.copytree(encoded, tmp_path, dirs_exist_ok=True)
    killer = functools.partial(_Killer, mark=tmp_path / "killed", noticed=noticed)
    monkeypatch.setattr(driver, "Supervisor", killer)
    # All CPUs of the cluster, so that the second group needs those of the first.
    assert driver.train(tiny_recipe(tmp_path, "scaling.workers=2"), "killed") == 12
    assert (tmp_path / "killed").exists()
    assert "(failure 1 of 3 allowed since the checkpoint of step 0)" in capfd.readouterr().err
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}


def test_a_batch_that_is_too_large_is_refused_before_ray_starts(
    encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(address: str | None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(driver.ray_session, "connected", start)
    many = ("data.shuffle_streams=8", "train.batch_size=8", "scaling.workers=8")
    for changes, wanted in (
        (("train.batch_size=1000",), "train.batch_size is 1000, but there are only 24 images"),
        (many, "8 workers cannot share the 4 shuffle streams of 5 shards"),
    ):
        with pytest.raises(UserError, match=wanted):
            driver.train(tiny_recipe(encoded, *changes), "refused")
    assert not (encoded / "runs" / "refused").exists()


def test_settings_of_ray_train_last_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    with ray_train.settings():
        assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
        assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "20"
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
    assert "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S" not in os.environ


def test_every_restart_says_why(status: Any) -> None:
    watched = Supervisor(status, Scaling(max_failures=3), newest_checkpoint=100)
    _fail(watched, DIED)
    reclaimed = RayActorError("actor", "node terminated", preempted=True)
    _fail(watched, WorkerGroupError("", {0: reclaimed}))
    _fail(watched, PreemptionError(PreemptionInfo(None, {"node": [0]})))
    assert _lines(status) == [
        "Restarting the workers: ValueError: boom (failure 1 of 3 allowed since the checkpoint of "
        "step 100)",
        "Restarting the workers: their node was preempted",
        "Restarting the workers: their node was preempted",
    ]


def test_damaged_data_ends_the_run_at_once(status: Any) -> None:
    watched = Supervisor(status, Scaling(max_failures=3), newest_checkpoint=100)
    ray.get(status.fail.remote("shard 3 is damaged; repair it"))
    with pytest.raises(DiffitError, match="^shard 3 is damaged; repair it$"):
        _fail(watched, DIED)
    assert _lines(status) == []


def test_failures_may_be_unlimited(status: Any) -> None:
    watched = Supervisor(status, Scaling(max_failures=-1), newest_checkpoint=0)
    for _ in range(9):
        _fail(watched, DIED)


def test_preemptions_and_missing_nodes_are_no_failures(status: Any) -> None:
    watched = Supervisor(status, Scaling(max_failures=0), newest_checkpoint=0)
    reclaimed = RayActorError("actor", "node terminated", preempted=True)
    _fail(watched, WorkerGroupError("", {0: reclaimed, 1: RuntimeError("connection reset")}))
    _fail(watched, PreemptionError(PreemptionInfo(None, {"node": [0]})))
    watched.after_controller_state_update(SchedulingState(None), ReschedulingState(NO_ROOM))
    with pytest.raises(DiffitError):
        _fail(watched, DIED)


def _place_in_vain(watched: Supervisor, times: int) -> None:
    for _ in range(times):
        full = ReschedulingState(NO_ROOM)
        watched.after_controller_state_update(SchedulingState(None), full)
        watched.after_controller_state_update(full, SchedulingState(None))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the supervisor's clock."""
    now = [1000.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


@pytest.mark.parametrize(("wait_s", "limit_s"), [(0.0, 300.0), (900.0, 900.0)])
def test_a_fixed_run_waits_for_a_node(
    status: Any, clock: Callable[[float], None], wait_s: float, limit_s: float
) -> None:
    watched = Supervisor(status, Scaling(workers=64, wait_s=wait_s), newest_checkpoint=0)
    for seconds in (0.0, 1.0, 20.0, 40.0, 80.0, limit_s - 1):
        clock(seconds)
        _place_in_vain(watched, 1)
    said = [line for line in _lines(status) if "training needs 64 CPUs" in line]
    assert len(said) == 3
    assert said[0].startswith(f"Waiting up to {limit_s - 20:.0f} s for nodes: training needs 64")
    # Workers that ran in between start a new wait.
    watched.after_controller_state_update(SchedulingState(None), RunningState())
    _place_in_vain(watched, 1)
    clock(2 * limit_s + 1)
    with pytest.raises(DiffitError, match=r"training needs 64 CPUs.*scaling\.wait_s to wait long"):
        _place_in_vain(watched, 1)


def test_an_elastic_run_waits_without_limit(status: Any, clock: Callable[[float], None]) -> None:
    watched = Supervisor(status, Scaling(workers="64..65"), newest_checkpoint=0)
    for seconds in (0.0, 5.0, 1e6):
        clock(seconds)
        _place_in_vain(watched, 1)
    assert [line.split(",")[0] for line in _lines(status)] == [
        "Waiting for nodes: training needs 64 CPUs"
    ] * 2


def test_a_run_can_be_stopped_while_it_waits(status: Any) -> None:
    watched = Supervisor(status, Scaling(workers=64), newest_checkpoint=0)
    _place_in_vain(watched, 1)
    ray.get(status.stop.remote())
    with pytest.raises(DiffitError, match="no workers were running"):
        _place_in_vain(watched, 1)


def _resize(watched: Supervisor) -> float:
    """Seconds that a resize of running workers waits."""
    decision = ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1.0})
    started_s = time.monotonic()
    watched.after_controller_state_update(RunningState(), ResizingState(decision))
    return time.monotonic() - started_s


def test_a_resize_waits_for_the_workers(status: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Supervisor(status, Scaling(workers="1..2"), newest_checkpoint=0)
    answered: list[bool] = []

    def answer() -> None:
        while not ray.get(status.poll.remote()).resizing:
            time.sleep(0.01)
        time.sleep(0.5)
        answered.append(True)
        status.answer_resize.remote()

    workers = threading.Thread(target=answer)
    workers.start()
    assert _resize(watched) >= 0.5
    assert answered
    workers.join()
    # Workers that hang do not hold it up forever, and the next ones are not asked again.
    monkeypatch.setattr(supervisor, "SAVE_LIMIT_S", 0.3)
    assert _resize(watched) >= 0.3
    assert not ray.get(status.poll.remote()).resizing
    assert _lines(status)[-1] == "No checkpoint was saved within 0.3 s; going on"
