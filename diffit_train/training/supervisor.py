"""Watches Ray Train's controller: failures, waiting for nodes, saving before a resize.

Ray Train counts failures over the whole life of a run, gives up on a run of fixed size after a few
minutes without a node, and resizes a worker group without telling it. The supervisor decides these
instead; Ray Train's own limits are off.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, PreemptionError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.failure_handling import default
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from diffit_train.config.scaling import Scaling
from diffit_train.errors import DiffitError
from diffit_train.progress import counted
from diffit_train.ray_session import missing_resources

# A run of fixed size waits at least this long for a node, as nodes come back from a reboot.
LOST_NODE_WAIT_S = 300.0
# Ray Train's attempts to place workers; each blocks its controller, and with it a stop request.
PLACEMENT_S = 20.0
SAY_FIRST_S, SAY_EVERY_S = 5.0, 60.0
POLL_S = 0.5
# Ray Train forgets a claim on resources that its controller has not renewed for three minutes.
SAVE_LIMIT_S = 120.0


class ReleasingWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Frees what it holds if it cannot start.

    Ray Train's own does not, if a worker dies after the group's state has been built. Its resources
    would be missing for the next attempt, and for other stages, as long as the command lives.
    """

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if self.has_started():
                self._worker_group_state.shutdown()
                self._clear_state()
            raise


class Supervisor(ControllerCallback):  # type: ignore[misc]
    """A callback of Ray Train's controller, which it can end by raising an error.

    Args:
        status: the run's `TrainingStatus`.
        scaling: the recipe's `scaling` section.
        newest_checkpoint: step of the newest checkpoint before this attempt.
    """

    def __init__(self, status: Any, scaling: Scaling, newest_checkpoint: int) -> None:
        self.status, self.scaling = status, scaling
        self.newest_checkpoint = newest_checkpoint
        self.failures = 0
        self.waiting_since_s: float | None = None
        self.said_s = 0.0

    def after_controller_start(self, train_run_context: Any) -> None:
        """Let Ray Train, which calls this in its controller, retry at any moment of start-up.

        It retries after a worker has died while starting, except as the worker is handed the
        training function (`WorkerGroup._start_impl`).
        """
        TrainController.worker_group_cls = ReleasingWorkerGroup
        if RayActorError not in default.RETRYABLE_CONTROLLER_ERRORS:
            default.RETRYABLE_CONTROLLER_ERRORS += (RayActorError,)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called by Ray Train after each iteration of its control loop.

        Raises:
            DiffitError: training is to end: too many failures, no node in time, or a stop request
                while no workers run.
        """
        if isinstance(current_state, RunningState):
            self.waiting_since_s = None
            return
        if isinstance(current_state, ResizingState):
            self._save_before_resize(current_state.scaling_decision.num_workers)
            return
        failed = isinstance(current_state, (RestartingState, ReschedulingState))
        if failed and current_state is not previous_state:
            self._count_failure(current_state.training_failed_error)
        if failed or isinstance(current_state, (InitializingState, SchedulingState)):
            self._check_waiting()
            if current_state is previous_state:  # Ray Train would ask again at once
                time.sleep(POLL_S)

    def _count_failure(self, error: BaseException) -> None:
        """Note a failure of workers; a new checkpoint since the last one makes it the first.

        Raises:
            DiffitError: restarting would not help, as data is damaged, or there were too many.
        """
        if reason := ray.get(self.status.why_failed.remote()):
            raise DiffitError(reason)
        if _has_no_room(error):
            return
        cause = ray.get(self.status.pop_stall.remote()) or cause_of(error)
        if was_preemption(error):
            self.status.say.remote("Restarting the workers: their node was preempted")
            return
        newest = ray.get(self.status.newest_checkpoint.remote())
        if newest > self.newest_checkpoint:
            self.newest_checkpoint, self.failures = newest, 0
        self.failures += 1
        most = self.scaling.max_failures
        if 0 <= most < self.failures:
            raise DiffitError(
                f"{cause} (failures since the checkpoint of step "
                f"{self.newest_checkpoint:,}: {self.failures}; scaling.max_failures is {most})"
            )
        which = f"failure {self.failures}" + (f" of {most} allowed" if most >= 0 else "")
        self.status.say.remote(
            f"Restarting the workers: {cause} ({which} since the checkpoint of step "
            f"{self.newest_checkpoint:,})"
        )

    def _check_waiting(self) -> None:
        """End the wait for workers if a stop was requested or the time is over; say so else."""
        now_s = time.monotonic()
        if self.waiting_since_s is None:
            self.waiting_since_s, self.said_s = now_s, now_s + SAY_FIRST_S - SAY_EVERY_S
        if ray.get(self.status.should_stop.remote()):
            raise DiffitError("no workers were running")
        waited_s, scaling = now_s - self.waiting_since_s, self.scaling
        elastic = scaling.min_workers != scaling.max_workers
        limit_s = float("inf") if elastic else max(LOST_NODE_WAIT_S, scaling.wait_s)
        cpus, gpus = scaling.needs("train")
        missing = missing_resources(cpus, gpus)
        full = (
            "the cluster has the CPUs and GPUs that training needs, but they are in use or on a "
            "node that is shutting down"
        )
        what = f"training needs {missing}" if missing else full
        if waited_s > limit_s:
            raise DiffitError(
                f"{what}; waited {waited_s:.0f} s for another node; rerun the command to resume, "
                "with a larger scaling.wait_s to wait longer, or with fewer scaling.workers"
            )
        if now_s - self.said_s >= SAY_EVERY_S:
            self.said_s = now_s
            until = "" if elastic else f" up to {limit_s - waited_s:.0f} s"
            self.status.say.remote(f"Waiting{until} for nodes: {what}")

    def _save_before_resize(self, workers: int) -> None:
        """Let the workers, which Ray Train replaces next, save a checkpoint, if they can."""
        self.status.say.remote(
            f"Going on with {counted(workers, 'worker')}; saving a checkpoint first"
        )
        self.status.request_resize.remote()
        started_s = time.monotonic()
        while time.monotonic() - started_s < SAVE_LIMIT_S:
            if ray.get(self.status.resize_answered.remote()):
                return
            time.sleep(POLL_S / 2)
        self.status.answer_resize.remote()
        self.status.say.remote(f"No checkpoint was saved within {SAVE_LIMIT_S:g} s; going on")


def was_preemption(error: BaseException) -> bool:
    """Whether workers failed because Ray had announced the end of their node."""
    if isinstance(error, PreemptionError):
        return True
    failures = getattr(error, "worker_failures", {}).values()
    causes = [
        f.health_check_failure if isinstance(f, WorkerHealthCheckFailedError) else f
        for f in failures
    ]
    return any(isinstance(cause, RayActorError) and cause.preempted for cause in causes)


def _has_no_room(error: BaseException) -> bool:
    """Whether Ray Train could not place the workers."""
    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    )


def cause_of(error: BaseException) -> str:
    """The last line of the innermost failure: the actual error."""
    failures = getattr(error, "worker_failures", None) or {}
    texts = [str(failure) for failure in failures.values()] or [str(error)]
    lines = [line for line in texts[0].strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
