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

from diffit_train.errors import UserError
from diffit_train.models.build import build_model
from diffit_train.runs.run import open_run
from diffit_train.training import worker
from diffit_train.training.control import Requests
from diffit_train.training.coordinator import start_coordinator
from diffit_train.training.failures import Failure
from diffit_train.training.trainer import Step
from diffit_train.training.worker import Link, choose_interface
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
    coordinator = start_coordinator()
    trainer: Any = SimpleNamespace(step=0, requests=Requests(), saved_s=time.monotonic())
    with Link(coordinator, "mine", 0, 2, trainer) as link:
        link.report(Step(8, record={"loss": 0.5}))
        ages = _wait_for(lambda: shown.get(("diffit_train_checkpoint_age_s", "mine"), []))
        grown = _wait_for(lambda: [age for age in ages if age >= 0.5])[0]
        trainer.saved_s = time.monotonic()
        _wait_for(lambda: ages[-1] < grown)
        # Also while a stop is under way.
        assert not trainer.requests.stop
        ray.get([coordinator.stop.remote(), coordinator.set_validated.remote(7)])
        _wait_for(lambda: trainer.requests.stop)
        assert trainer.requests.validated == 7
        seen = len(ages)
        _wait_for(lambda: ages[seen:])
    news = ray.get(coordinator.news.remote(0))
    assert news.record == {"step": 8, "loss": 0.5}
    other: Any = SimpleNamespace(step=0, requests=Requests(), saved_s=0.0)
    Link(coordinator, "mine", 1, 2, other).report(Step(8, phases={"forward": 0.5}))
    assert shown["diffit_train_loss", "mine"] == [0.5]
    assert shown["diffit_train_rank_phase_s", "mine", "1", "forward"] == [0.5]
    ray.kill(coordinator)


def test_a_class_that_a_node_lacks_is_named_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    explained: list[Failure] = []
    coordinator = SimpleNamespace(explain=SimpleNamespace(remote=explained.append))
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ray, "get", lambda value, timeout: value)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(worker, "Trainer", lambda run, *_: build_model(run.recipe))
    recipe = tiny_recipe(tmp_path, "model={architecture: 'nowhere.model:Net'}")
    config = {"run": open_run(recipe, "r"), "mlflow_run_id": "m", "lease": None}
    threads = torch.get_num_threads()
    with pytest.raises(UserError):
        worker.train_worker({**config, "coordinator": coordinator})
    torch.set_num_threads(threads)
    (failure,) = explained
    assert failure.final
    assert failure.cause.startswith(
        f"on node {socket.gethostname()}: model.architecture is 'nowhere.mod"
    )
    assert "on a cluster: on every node" in failure.cause


def _wait_for(what: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (value := what()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value
