"""Actors that die: their tasks go to others, and what kills every actor ends the evaluation."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.pool import Actors, _once

pytestmark = pytest.mark.usefixtures("ray_session")


class Worker:
    """An actor without an evaluation."""

    def ready(self) -> None:
        """Nothing to load."""

    def work(self, task: Any) -> Any:
        """Return a number; die over "kill", and once over a path that does not exist yet."""
        if task == "bad":
            raise UserError("bad task")
        if isinstance(task, Path) and task.exists():
            return task
        if isinstance(task, Path):
            task.touch()
        if task == "kill" or isinstance(task, Path):
            os._exit(1)
        time.sleep(0.05)
        return task


class Stillborn(Worker):
    """An actor that runs out of memory when it loads."""

    def ready(self) -> None:
        os._exit(1)


def _run(kind: type, tasks: list[Any], count: int = 2) -> list[Any]:
    remote: Any = ray.remote(num_cpus=0, max_concurrency=2, max_restarts=-1, max_task_retries=-1)
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
    actors = Actors(remote(kind).remote, count)
    try:
        return [value for _, value in actors.run(tasks, lambda a, t: _once(a.work).remote(t), str)]
    finally:
        actors.close()


def test_the_tasks_of_an_actor_that_dies_are_done(tmp_path: Path) -> None:
    """It dies twice, each time with another task of its own."""
    tasks = [1, tmp_path / "first", 2, tmp_path / "second", *range(3, 9)]
    assert sorted(map(str, _run(Worker, tasks))) == sorted(map(str, tasks))


def test_a_task_that_kills_every_actor_is_named() -> None:
    with pytest.raises(DiffitError, match="kill failed 3 times"):
        _run(Worker, ["kill"])


def test_actors_that_die_at_the_start_end_the_evaluation() -> None:
    with pytest.raises(DiffitError, match="die before they start"):
        _run(Stillborn, [1])


def test_a_users_mistake_keeps_its_reason() -> None:
    with pytest.raises(UserError, match="bad task"):
        _run(Worker, ["bad"])
