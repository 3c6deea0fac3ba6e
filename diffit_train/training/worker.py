"""The Ray side of training: the worker function and its hooks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.exceptions import RayActorError, RayError
from ray.train.torch import TorchConfig

from diffit_train.config import Recipe
from diffit_train.errors import DataError
from diffit_train.metric_names import CHECKPOINT_AGE, RANK_PHASE
from diffit_train.models.precision import tf32
from diffit_train.plugins import PluginError
from diffit_train.redaction import first_line
from diffit_train.runs.lease import Lease
from diffit_train.training.stall import StallGuard, exit_with_stacks
from diffit_train.training.status import Polled

POLL_S = 0.5
# For how long workers wait to be replaced, once they have saved a checkpoint for it.
RESIZE_WAIT_S = 60.0
# For the driver to learn why a rank exits.
REPORT_LIMIT_S = 10.0

# Evaluates the checkpoint of a step while training continues; returns a one-line summary.
Validate = Callable[[int], str]


def choose_interface() -> None:
    """Let gloo use the interface of this node's address in Ray, unless the user has named one.

    By default gloo takes the address of the host's name, which on Debian is a loopback address,
    where no other node can reach it.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


@dataclass
class NodeNetwork(TorchConfig):  # type: ignore[misc]
    """Process groups on the network of Ray's nodes.

    Attributes:
        status: the run's `TrainingStatus`, which learns of each worker group.
    """

    status: Any = None

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
        ray.get(backend_config.status.begin_group.remote(len(calls)))
        super().on_start(worker_group, backend_config)


class RayHooks:
    """`training.control.TrainerHooks` for one rank under Ray Train."""

    def __init__(
        self,
        status: Any,
        rank: int,
        world: int,
        run: str,
        lease: Lease,
        stall_timeout_s: float = math.inf,
    ) -> None:
        self.status, self.rank, self.world, self.run = status, rank, world, run
        self._stall = StallGuard(stall_timeout_s, self._exit)
        self.doing = self._stall.doing
        self._left = threading.Event()
        self.lease = lease
        self.begun = False
        self.stopping = threading.Event()
        self.resizing = False
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._gauges: dict[str, Any] = {}
        self._saved_s = time.monotonic()
        if rank == 0:
            threading.Thread(target=self._watch, name="status", daemon=True).start()

    def _exit(self, what: str, stacks: str) -> None:
        reason = f"rank {self.rank} on {socket.gethostname()} made {what}"
        with contextlib.suppress(RayError, TimeoutError):  # the driver may be gone
            ray.get(self.status.note_stall.remote(reason), timeout=REPORT_LIMIT_S)
        exit_with_stacks(self.lease.url, self.rank, f"{reason}\n{stacks}")

    def leave(self) -> None:
        """End this rank's threads."""
        self._left.set()
        self._stall.leave()

    def _watch(self) -> None:
        # In a thread, so that no training step waits for the actor to answer.
        with contextlib.suppress(RayActorError):  # the driver is gone; Ray ends this process
            while not self._left.wait(POLL_S):
                polled: Polled = ray.get(self.status.poll.remote())
                self._begun, self._ended = self._begun | polled.validating, polled.validated
                self.resizing = polled.resizing
                if polled.stopping:
                    self.stopping.set()
                # In this thread, so that it grows while training hangs.
                if self.begun:
                    self._show(CHECKPOINT_AGE, time.monotonic() - self._saved_s)

    def report(self, record: dict[str, Any]) -> None:
        """Send to the driver, and to Ray's metrics as diffit_train_NAME."""
        if self.rank != 0:
            return
        if not self.begun:
            self.begun = True
            self.status.begin.remote(self.world, record["step"])
        self.status.put.remote(record)
        for name, value in record.items():
            self._show(name, value)

    def report_phases(self, seconds: Mapping[str, float]) -> None:
        """Send this rank's phases to Ray's metrics."""
        for phase, value in seconds.items():
            self._show(RANK_PHASE, value, rank=str(self.rank), phase=phase)

    def _show(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge diffit_train_NAME."""
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(f"diffit_train_{name}", name, ("run", *labels))
        self._gauges[name].set(value, tags={"run": self.run, **labels})

    def require_lease(self) -> None:
        """Raise LostLeaseError if another command has taken over the run."""
        self.lease.require()

    def saved(self, step: int) -> None:
        """Tell the supervisor, and begin to count the checkpoint's age."""
        self._saved_s = time.monotonic()
        self.status.saved.remote(step)

    def say(self, text: str) -> None:
        """Send to the driver."""
        if self.rank == 0:
            self.status.say.remote(text)

    def should_stop(self) -> bool:
        """Whether the driver has been asked to stop."""
        return self.stopping.is_set()

    def should_resize(self) -> bool:
        """Whether the supervisor has announced a resize."""
        return self.resizing

    def await_resize(self, saved: bool) -> None:
        """Answer the supervisor; Ray Train then ends this process."""
        self.resizing = False
        self.answer_resize()
        if saved:
            time.sleep(RESIZE_WAIT_S)
            self.say("The workers were not replaced; training goes on")

    def answer_resize(self) -> None:
        """Tell the supervisor that nothing more will be saved for a resize."""
        if self.rank == 0:
            self.status.answer_resize.remote()

    def preempted(self) -> bool:
        """Whether Ray has announced the preemption of one of this group's nodes."""
        import ray.train

        return ray.train.get_preemption_info() is not None

    def validate(self, step: int) -> None:
        """Start Ray Train's own validation, which is keyed by a (nearly empty) checkpoint."""
        import ray.train
        from ray.train import ValidationTaskConfig

        metrics = {"step": step}
        if self.rank:
            ray.train.report(metrics)
            return
        self._begun = self._begun | {step}
        self.status.begin_validation.remote(step)
        with tempfile.TemporaryDirectory(prefix="diffit-validate-") as folder:
            Path(folder, "step.json").write_text(json.dumps(metrics))
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                validation=ValidationTaskConfig(fn_kwargs=metrics),
            )

    def validating(self) -> set[int]:
        """Evaluations that have not ended, also those that an earlier worker group started."""
        return self._begun - self._ended


def train_worker(config: dict[str, Any]) -> None:
    """Run by each Ray Train worker."""
    import ray.train
    import ray.train.torch

    from diffit_train.training.checkpointer import UnrecoverableError
    from diffit_train.training.loop import train_until_done

    recipe, run = Recipe.model_validate(config["recipe"]), config["run"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    timeout_s = recipe.scaling.stall_timeout_s
    hooks = RayHooks(config["status"], rank, world, run, config["lease"], timeout_s)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(recipe.scaling.cpus_per_worker)
    try:
        with tf32(recipe.train.precision == "tf32"):
            step = train_until_done(recipe, run, config["mlflow_run_id"], device, hooks)
    except UnrecoverableError as error:  # raised on all ranks
        if hooks.rank == 0:
            ray.get(hooks.status.fail.remote(str(error)))
        return
    except PluginError as error:  # this node lacks it, or has another version
        ray.get(hooks.status.fail.remote(f"on node {socket.gethostname()}: {error}"))
        raise
    except DataError as error:  # raised on one rank; its end ends the others
        ray.get(hooks.status.fail.remote(str(error)))
        raise
    finally:
        hooks.leave()
        hooks.answer_resize()
    ray.train.report({"step": step})


class ValidationTask:
    """Run by Ray Train, as a task, for each checkpoint to evaluate."""

    def __init__(self, status: Any, validate: Validate) -> None:
        self.status, self.validate = status, validate

    def __call__(self, checkpoint: Any, step: int) -> dict[str, Any]:
        """Evaluate the checkpoint of a step, and tell the user how it went."""
        try:
            self.status.say.remote(self.validate(step))
        except Exception as error:  # Ray Train only logs it, where nobody looks
            self.status.say.remote(f"Could not evaluate step {step:,}: {first_line(error)}")
            raise
        finally:
            self.status.end_validation.remote(step)
        return {"step": step}
