"""What a training worker does around the loop: its network, its gauges, its answers."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest
import ray
import ray.train.torch
import ray.util.metrics
import torch

from diffit_train.config import Recipe
from diffit_train.errors import UserError
from diffit_train.models.build import build_model
from diffit_train.runs.lease import Lease
from diffit_train.training import loop, worker
from diffit_train.training.status import TrainingStatus
from diffit_train.training.worker import RayHooks, choose_interface
from tests.conftest import tiny_recipe


def _chosen(named: str) -> tuple[str, str]:
    """In a worker: the interface that gloo is told, and the node's address."""
    if named:
        os.environ["GLOO_SOCKET_IFNAME"] = named
    else:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
    choose_interface()
    return os.environ["GLOO_SOCKET_IFNAME"], ray.util.get_node_ip_address()


@pytest.mark.usefixtures("ray_session")
def test_gloo_uses_the_interface_of_the_node_unless_told_otherwise() -> None:
    remote = ray.remote(num_cpus=0)(_chosen)
    interface, address = ray.get(remote.remote(""))
    assert address in [found.address for found in psutil.net_if_addrs()[interface]]
    assert ray.get(remote.remote("mine"))[0] == "mine"


class RecordedGauge:
    """Stands for Ray's: values by name and labels."""

    shown: ClassVar[dict[tuple[str, ...], list[float]]] = {}

    def __init__(self, name: str, description: str, keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags.keys() == set(self.keys)
        self.shown.setdefault((self.name, *tags.values()), []).append(value)


@pytest.mark.usefixtures("ray_session")
def test_gauges_show_the_age_of_the_checkpoint_and_phases_by_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = RecordedGauge.shown
    shown.clear()
    monkeypatch.setattr(ray.util.metrics, "Gauge", RecordedGauge)
    monkeypatch.setattr(worker, "POLL_S", 0.02)
    status: Any = TrainingStatus.remote()  # type: ignore[attr-defined]
    hooks = RayHooks(status, 0, 2, "mine", Lease("unused", 1, ""))
    hooks.report({"step": 8, "loss": 0.5})
    ages = _wait_for(lambda: shown.get(("diffit_train_checkpoint_age_s", "mine"), []))
    grown = _wait_for(lambda: [age for age in ages if age >= 0.5])[0]
    hooks.saved(8)
    assert ray.get(status.newest_checkpoint.remote()) == 8
    _wait_for(lambda: ages[-1] < grown)
    # Also while a stop is under way.
    ray.get(status.stop.remote())
    _wait_for(hooks.should_stop)
    seen = len(ages)
    _wait_for(lambda: ages[seen:])
    RayHooks(status, 1, 2, "mine", Lease("unused", 1, "")).report_phases(
        {"data": 0.25, "forward": 0.5}
    )
    assert shown["diffit_train_loss", "mine"] == [0.5]
    assert shown["diffit_train_rank_phase_s", "mine", "1", "forward"] == [0.5]
    hooks.leave()
    ray.kill(status)


@pytest.mark.usefixtures("ray_session")
def test_workers_answer_a_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_S", 0.02)
    monkeypatch.setattr(worker, "RESIZE_WAIT_S", 0.0)
    waited: list[str] = []
    monkeypatch.setattr(RayHooks, "say", lambda self, text: waited.append(text))
    status: Any = TrainingStatus.remote()  # type: ignore[attr-defined]
    hooks, other = (
        RayHooks(status, 0, 2, "mine", Lease("unused", 1, "")),
        RayHooks(status, 1, 2, "mine", Lease("unused", 1, "")),
    )
    assert not hooks.should_resize()
    for saved in (True, False):
        ray.get(status.request_resize.remote())
        _wait_for(hooks.should_resize)
        other.await_resize(saved)
        assert not ray.get(status.resize_answered.remote())
        waited.clear()
        hooks.await_resize(saved)
        assert bool(waited) == saved
        assert ray.get(status.resize_answered.remote())
        _wait_for(lambda: not hooks.should_resize())
    hooks.leave()
    ray.kill(status)


def test_a_class_that_a_node_lacks_is_named_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    hooks = SimpleNamespace(
        rank=1,
        status=SimpleNamespace(fail=SimpleNamespace(remote=said.append)),
        leave=lambda: None,
        answer_resize=lambda: None,
    )
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(worker, "RayHooks", lambda *_: hooks)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))

    def build(recipe: Recipe, *_: object) -> None:
        build_model(recipe)

    monkeypatch.setattr(loop, "train_until_done", build)
    recipe = tiny_recipe(tmp_path, "model={architecture: 'nowhere.model:Net'}")
    config = {"recipe": recipe.model_dump(), "run": "r", "mlflow_run_id": "m"}
    config |= {"status": None, "lease": None}
    threads = torch.get_num_threads()
    with pytest.raises(UserError):
        worker.train_worker(config)
    torch.set_num_threads(threads)
    (reason,) = said
    assert reason.startswith(f"on node {socket.gethostname()}: model.architecture is 'nowhere.mod")
    assert "on a cluster: on every node" in reason


def _wait_for(what: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (value := what()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value
