"""What each Ray Train worker runs: it trains, reports, saves and stops."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayActorError, RayError
from ray.train import UserCallback
from ray.train.torch import TorchConfig

from diffit_train.config import Recipe
from diffit_train.config.plugins import PluginError
from diffit_train.errors import DataError, DiffitError
from diffit_train.models.precision import tf32
from diffit_train.progress import show_log
from diffit_train.tracking import CHECKPOINT_AGE, RANK_PHASE
from diffit_train.training.checkpointer import UnrecoverableError
from diffit_train.training.failures import Failure, cause_of, was_preempted
from diffit_train.training.stall import StallGuard, exit_with_stacks
from diffit_train.training.trainer import Step, Trainer

POLL_S = 0.5
# Between reports of the step alone.
REPORT_S = 1.0
# For the coordinator to learn why a rank exits.
EXPLAIN_LIMIT_S = 10.0

logger = logging.getLogger(__name__)


def train_worker(config: dict[str, Any]) -> None:
    """Train as one rank of a worker group, from the newest checkpoint to the end or a stop."""
    coordinator, run, lease = config["coordinator"], config["run"], config["lease"]
    recipe: Recipe = run.recipe
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.scaling.cpus_per_worker)

    def explain(reason: str, final: bool = False) -> None:
        with contextlib.suppress(RayError, TimeoutError):  # the command may be gone
            failure = Failure(reason, final)
            ray.get(coordinator.explain.remote(failure), timeout=EXPLAIN_LIMIT_S)

    def stalled(what: str, stacks: str) -> None:
        reason = f"rank {rank} on {socket.gethostname()} made {what}"
        explain(reason)
        exit_with_stacks(lease.url, rank, f"{reason}\n{stacks}")

    try:
        with (
            show_log(print if rank else coordinator.say.remote),
            tf32(recipe.train.precision == "tf32"),
            StallGuard(recipe.scaling.stall_timeout_s, stalled) as stall,
            Trainer(run, lease, config["mlflow_run_id"], device, stall) as trainer,
            Link(coordinator, run.name, rank, world, trainer) as link,
        ):
            saved_for_preemption = False
            for step in trainer:
                link.report(step)
                if step.check_preemption and not saved_for_preemption and _preempted():
                    trainer.save()
                    saved_for_preemption = trainer.wait()
                    logger.info(
                        f"Node preemption announced; checkpoint saved at step {step.step:,}"
                    )
                if step.stop:
                    trainer.save()
                    break
            trainer.finish()
    except (UnrecoverableError, DataError) as error:  # would only be raised again
        explain(str(error), final=True)
        raise
    except PluginError as error:  # this node lacks it, or has another version
        explain(f"on node {socket.gethostname()}: {error}", final=True)
        raise


def _preempted() -> bool:
    """Whether a node of this worker group is about to be preempted (collective)."""
    return ray.train.get_preemption_info() is not None


class Link:
    """A rank's link to whoever runs the training: reports one way, requests the other.

    On rank 0, a thread asks for requests, so that no step waits for the answer.

    Args:
        coordinator: the training's `Coordinator`.
        run: its name, for Ray's metrics.
        trainer: of this rank.
    """

    def __init__(self, coordinator: Any, run: str, rank: int, world: int, trainer: Trainer) -> None:
        self.coordinator, self.run, self.rank, self.trainer = coordinator, run, rank, trainer
        self._shown_s = 0.0
        self._gauges: dict[str, Any] = {}
        self._left = threading.Event()
        trainer.requests.watch_preemption = True
        if rank == 0:
            self._poll()
            ray.get(coordinator.begin.remote(world, trainer.step))
            coordinator.report.remote({"step": trainer.step})
            threading.Thread(target=self._watch, name="requests", daemon=True).start()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _poll(self) -> None:
        requests = self.trainer.requests
        requests.stop, requests.validated = ray.get(self.coordinator.poll.remote())

    def _watch(self) -> None:
        with contextlib.suppress(RayActorError):  # the command is gone; Ray kills this process
            while not self._left.wait(POLL_S):
                self._poll()
                # In this thread, so that it grows while training stalls.
                self._show(CHECKPOINT_AGE, time.monotonic() - self.trainer.saved_s)

    def report(self, step: Step) -> None:
        """Send to the command, and to Ray's metrics as diffit_train_NAME."""
        for phase, value in step.phases.items():
            self._show(RANK_PHASE, value, rank=str(self.rank), phase=phase)
        if self.rank:
            return
        for name, value in step.record.items():
            self._show(name, value)
        now_s = time.monotonic()
        if step.record or now_s - self._shown_s >= REPORT_S:
            self._shown_s = now_s
            self.coordinator.report.remote({"step": step.step, **step.record})

    def _show(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge diffit_train_NAME."""
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(f"diffit_train_{name}", name, ("run", *labels))
        self._gauges[name].set(value, tags={"run": self.run, **labels})


class FailureReporter(UserCallback):  # type: ignore[misc]
    """Tells the coordinator why workers failed; Ray Train calls it before it restarts them.

    An error that it raises ends the training.
    """

    def __init__(self, coordinator: Any) -> None:
        self.coordinator = coordinator

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Report the first rank's error.

        Raises:
            DiffitError: training cannot go on.
        """
        errors = list(worker_exceptions.values())
        preempted = any(was_preempted(error) for error in errors)
        failure = Failure(cause_of(errors[0]), preempted=preempted)
        if reason := ray.get(self.coordinator.fail.remote(failure)):
            raise DiffitError(reason)


def choose_interface() -> None:
    """Let gloo use the interface of this node's address in Ray, unless the user has named one.

    By default gloo takes the address of the host's name, which on Debian is a loopback address,
    where no other node can reach it.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


@dataclass
class NodeNetwork(TorchConfig):  # type: ignore[misc]
    """Process groups on the network of Ray's nodes.

    Attributes:
        coordinator: the training's `Coordinator`, which learns of each worker group.
    """

    coordinator: Any = None

    @property
    def backend_cls(self) -> Any:
        """As Ray Train's own, but each worker chooses its interface first."""
        return NodeNetworkBackend


class NodeNetworkBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's backend for torch on the network of Ray's nodes."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called by Ray Train before it initializes the process group."""
        calls = worker_group.execute_async(choose_interface)
        ray.get(calls, timeout=backend_config.timeout_s)
        ray.get(backend_config.coordinator.start_group.remote(len(calls)))
        super().on_start(worker_group, backend_config)
