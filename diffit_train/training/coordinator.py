"""The actor that runs Ray Train, and through which the command and the workers talk.

Ray Train's own checkpoints and resumption are not used: it would resume an old name with another
recipe, and its snapshot may be truncated. Workers that start, for whatever reason, resume from the
newest committed checkpoint of the run; Ray gets a fresh name each time.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffit_train import ray_session, storage
from diffit_train.errors import DiffitError
from diffit_train.progress import counted
from diffit_train.runs.run import Run
from diffit_train.training.failures import Failure, Limits

# For how long Ray Train tries to place workers.
PLACEMENT_S = 20.0
# Its workers are looked after more often than every 2 s.
RAY_TRAIN = {
    "HEALTH_CHECK_INTERVAL_S": "0.5",
    "WORKER_GROUP_START_TIMEOUT_S": f"{PLACEMENT_S:g}",
}


class News(NamedTuple):
    """What has happened since the command asked last.

    Attributes:
        record: the newest values that rank 0 has reported.
        lines: for the user.
        workers: of the group that trains; 0 while there is none.
        placed: whether the cluster has placed a group.
        reason: why training cannot go on; empty while it can.
    """

    record: dict[str, Any]
    lines: list[str]
    workers: int
    placed: bool
    reason: str = ""


class Coordinator:
    """One training under Ray Train; an actor. Killing it ends the training.

    `fit` has a thread to itself; the others run one after the other, in the order of the calls.
    """

    def __init__(self) -> None:
        for name, value in RAY_TRAIN.items():
            os.environ.setdefault(f"RAY_TRAIN_{name}", value)
        self.record: dict[str, Any] = {}
        self.lines: list[str] = []
        self.limits: Limits | None = None
        self.reason = ""
        self.workers = self.groups = 0
        self.stopping = self.placed = False
        self.validated = math.inf
        self.reported: Failure | None = None

    @ray.method(concurrency_group="fit")  # type: ignore[untyped-decorator]
    def fit(self, config: Mapping[str, Any], scratch: str) -> None:
        """Train to the end or a stop; Ray Train restarts workers that fail.

        Args:
            config: what each worker gets, such as the run.
            scratch: URL for Ray Train's own state.

        Raises:
            ray.train.TrainingFailedError: Ray Train gave up.
        """
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from diffit_train.training.stall import SLOW_FACTOR
        from diffit_train.training.worker import FailureReporter, NodeNetwork, train_worker

        self.run: Run = config["run"]
        me, scaling = ray.get_runtime_context().current_actor, self.run.recipe.scaling
        self.limits = self.limits or Limits(scaling, self.run.checkpoints.latest_step)
        resources = {"CPU": float(scaling.cpus_per_worker)}
        if scaling.gpus_per_worker:
            resources["GPU"] = float(scaling.gpus_per_worker)
        environment = {} if scaling.gpus_per_worker else {"env_vars": ray_session.KEEP_FREED_MEMORY}
        fewest, most = scaling.min_workers, scaling.max_workers
        trainer = TorchTrainer(
            train_worker,
            torch_config=NodeNetwork(
                coordinator=me, timeout_s=math.ceil(SLOW_FACTOR * scaling.stall_timeout_s)
            ),
            train_loop_config={**config, "coordinator": me},
            scaling_config=ScalingConfig(
                num_workers=most if fewest == most else (fewest, most),
                # The command notices that a run can grow, and lets it save first.
                elastic_resize_monitor_interval_s=math.inf,
                use_gpu=scaling.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=f"attempt-{uuid.uuid4().hex[:12]}",
                worker_runtime_env=environment,
                failure_config=FailureConfig(
                    max_failures=-1, max_preemption_failures=-1, controller_failure_limit=0
                ),
                callbacks=[FailureReporter(me)],
                **_ray_storage(scratch),
            ),
        )
        try:
            trainer.fit()
        finally:
            self.workers, self.placed = 0, False

    # ---- For the command ----

    def news(self, seen: int) -> News:
        """What is new after the first `seen` lines."""
        return News(self.record, self.lines[seen:], self.workers, self.placed, self.reason)

    def stop(self) -> None:
        """Ask the workers to save and exit."""
        self.stopping = True

    def resume(self) -> None:
        """Let workers train again after a stop."""
        self.stopping = False

    def set_validated(self, step: float) -> None:
        """Note that no checkpoint up to this step awaits its evaluation."""
        self.validated = step

    # ---- For the workers ----

    def start_group(self, workers: int) -> None:
        """Note that a worker group has started."""
        self.placed = True
        started = counted(workers, "worker has", "workers have")
        self.say(f"{started} started; loading the model")

    def begin(self, workers: int, step: int) -> None:
        """Note that a worker group begins to train."""
        self.groups += 1
        self.workers = workers
        verb = "Resuming" if self.groups > 1 else "Training"
        self.say(f"{verb} from step {step:,} on {counted(workers, 'worker')}")

    def report(self, record: Mapping[str, Any]) -> None:
        """Take over the values of a record."""
        self.record = {**self.record, **record}

    def say(self, line: str) -> None:
        """Add a line for the user."""
        self.lines.append(line)

    def poll(self) -> tuple[bool, float]:
        """Whether workers are to save and exit, and up to which step checkpoints are evaluated."""
        return self.stopping, self.validated

    def explain(self, failure: Failure) -> None:
        """Note why a worker is about to fail; what it does to its peers is not the cause."""
        if self.reported is None or failure.final > self.reported.final:
            self.reported = failure

    def fail(self, failure: Failure) -> str:
        """Count the failure of a worker group; why training cannot go on, empty if it can."""
        failure, self.reported = self.reported or failure, None
        self.workers, self.placed = 0, False
        assert self.limits is not None
        try:
            newest = self.run.checkpoints.refresh().latest_step
            self.say(self.limits.count(failure, newest))
        except (DiffitError, OSError) as error:
            self.reason = str(error)
        return self.reason


def start_coordinator() -> Any:
    """The handle of a new coordinator, on this machine."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    if settings := {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_")}:
        options["runtime_env"] = {"env_vars": settings}
    return ray.remote(concurrency_groups={"fit": 1}, **options)(Coordinator).remote()


def _ray_storage(url: str) -> dict[str, Any]:
    """RunConfig arguments for where Ray Train keeps its own state."""
    if storage.is_local(url):
        return {"storage_path": str(storage.local_path(url).absolute())}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = storage.filesystem(url)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
