"""What the command counts, what it waits for, and when a run can grow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from diffit_train.config.scaling import Scaling
from diffit_train.errors import DiffitError, UserError
from diffit_train.runs.run import open_run
from diffit_train.training import cluster, driver
from diffit_train.training.cluster import Wait, capacity
from diffit_train.training.coordinator import Coordinator, News
from diffit_train.training.failures import Failure, Limits, cause_of, was_preempted
from tests.conftest import tiny_recipe, train

DIED = Failure("ValueError: boom")
PREEMPTED = Failure("The actor died", preempted=True)


def test_failures_without_a_new_checkpoint_are_limited() -> None:
    limits = Limits(Scaling(max_failures=2), newest_step=100)
    for newest in (100, 200, 300):
        assert limits.count(DIED, newest) == (
            "Restarting the workers: ValueError: boom (failure 1 of 2 allowed since the "
            f"checkpoint of step {newest})"
        )
        limits.count(DIED, newest)
    # Written again after a rollback: no progress.
    with pytest.raises(DiffitError, match=r"boom \(failures .*step 300: 3; .*max_failures is 2"):
        limits.count(DIED, 250)


def test_failures_may_be_unlimited() -> None:
    limits = Limits(Scaling(max_failures=-1), newest_step=0)
    for _ in range(9):
        assert "allowed" not in limits.count(DIED, 0)


def test_what_a_restart_cannot_cure_ends_the_run() -> None:
    limits = Limits(Scaling(max_failures=3), newest_step=100)
    with pytest.raises(DiffitError, match="^shard 3 is damaged$"):
        limits.count(Failure("shard 3 is damaged", final=True), 100)


def test_preemptions_have_no_limit() -> None:
    limits = Limits(Scaling(max_failures=0), newest_step=0)
    for _ in range(3):
        assert limits.count(PREEMPTED, 0) == "Restarting the workers: their node was preempted"
    with pytest.raises(DiffitError, match=r"scaling\.max_failures is 0"):
        limits.count(DIED, 0)


def test_the_cause_of_a_failure_is_its_last_line() -> None:
    assert cause_of(RuntimeError("Traceback …\nValueError: boom\n")) == "ValueError: boom"
    died = WorkerGroupError("", {1: RuntimeError("Traceback …\nOSError: gone")})
    assert cause_of(died) == "OSError: gone"
    reclaimed = RayActorError("actor", "node terminated", preempted=True)
    assert was_preempted(reclaimed)
    assert was_preempted(SimpleNamespace(health_check_failure=reclaimed))  # type: ignore[arg-type]
    assert not was_preempted(RayActorError("actor", "killed"))
    assert not was_preempted(RuntimeError("connection reset"))


@pytest.mark.parametrize(("wait_s", "limit_s"), [(0.0, 300.0), (900.0, 900.0)])
def test_a_fixed_run_waits_for_a_node(wait_s: float, limit_s: float) -> None:
    scaling, missing = Scaling(workers=64, node_wait_timeout_s=wait_s), "64 CPUs, not 2"
    wait = Wait(scaling, since_s=1000.0)
    lines = [wait.check(1000.0 + s, missing) for s in (0.0, 6.0, 20.0, 40.0, 80.0, limit_s - 1)]
    assert [bool(line) for line in lines] == [False, True, False, False, True, True]
    assert lines[1] == f"Waiting up to {limit_s - 6:.0f} s for nodes: training needs {missing}"
    with pytest.raises(DiffitError, match=rf"{missing}; .*scaling\.node_wait_timeout_s"):
        wait.check(1001.0 + limit_s, missing)


def test_an_elastic_run_waits_without_limit() -> None:
    wait = Wait(Scaling(workers="64..65"), since_s=0.0)
    assert wait.check(1e6, "64 CPUs") == "Waiting for nodes: training needs 64 CPUs"


def test_workers_that_are_starting_are_not_waited_for() -> None:
    wait = Wait(Scaling(workers=2), since_s=0.0)
    assert not wait.check(30.0, "")
    assert "in use" in wait.check(70.0, "")


@pytest.mark.usefixtures("ray_session")
def test_an_elastic_run_grows_into_room_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capacity(Scaling()) == 2
    assert capacity(Scaling(cpus_per_worker=2)) == 1
    assert capacity(Scaling(gpus_per_worker=1)) == 0
    room = [2]
    monkeypatch.setattr(cluster, "capacity", lambda scaling: room[0])
    training: Any = object.__new__(cluster.RayTraining)
    training.scaling = Scaling(workers="1..4", resize_check_s=5)
    training._growing, training._grown_s = False, 0.0
    training._room, training._room_since_s = 0, 0.0
    now = [1000.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now[0])

    def grows(at_s: float) -> bool:
        now[0] = 1000.0 + at_s
        return bool(training._can_grow())

    training._news = News({}, [], 2, True)
    assert not grows(0.0)
    room[0] = 3
    assert [grows(at_s) for at_s in (10.0, 12.0, 30.0, 36.0)] == [False, False, False, True]
    # The nodes have room, but others use it.
    assert [grows(at_s) for at_s in (60.0, 100.0, 120.0)] == [False, False, True]
    room[0] = 9
    assert [grows(at_s) for at_s in (130.0, 160.0)] == [False, True]
    training._news = training._news._replace(workers=4)
    assert not grows(1000.0)


def test_the_coordinator_keeps_the_first_cause(tmp_path: Path) -> None:
    coordinator: Any = Coordinator()
    coordinator.run = open_run(tiny_recipe(tmp_path), "new")
    coordinator.limits = Limits(Scaling(max_failures=3), newest_step=0)
    coordinator.start_group(2)
    coordinator.begin(2, 40)
    news = coordinator.news(0)
    assert (news.workers, news.placed) == (2, True)
    assert news.lines == [
        "2 workers have started; loading the model",
        "Training from step 40 on 2 workers",
    ]
    stalled, damaged = Failure("rank 1 made no progress"), Failure("damaged", final=True)
    coordinator.explain(stalled)
    coordinator.explain(DIED)
    assert not coordinator.fail(DIED)
    assert coordinator.news(2) == News(
        {},
        [
            "Restarting the workers: rank 1 made no progress (failure 1 of 3 allowed since the "
            "checkpoint of step 0)"
        ],
        0,
        False,
    )
    coordinator.begin(1, 40)
    assert coordinator.news(3).lines == ["Resuming from step 40 on 1 worker"]
    for each in (stalled, damaged, DIED):
        coordinator.explain(each)
    assert coordinator.fail(DIED) == coordinator.news(0).reason == "damaged"


def test_a_batch_that_is_too_large_is_refused_before_ray_starts(
    encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(address: str | None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(driver.ray_session, "connected", start)
    many = ("data.shuffle_streams=8", "train.batch_size=8", "scaling.workers=8")
    for changes, key in (
        (("train.batch_size=1000",), "train.batch_size is 1000"),
        (many, "8 workers cannot share the 4 shuffle streams"),
    ):
        with pytest.raises(UserError, match=key):
            train(tiny_recipe(encoded, *changes), "refused")
    assert not (encoded / "runs" / "refused").exists()
