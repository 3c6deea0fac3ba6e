"""Training under Ray Train, as the command sees it: progress, failures, waiting, growth."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffit_train import storage
from diffit_train.config.scaling import Scaling
from diffit_train.errors import DiffitError
from diffit_train.progress import Progress, loss_and_rate, say
from diffit_train.ray_session import missing_resources
from diffit_train.runs.lease import Lease
from diffit_train.runs.run import Run
from diffit_train.training.coordinator import PLACEMENT_S, Coordinator, Failure, News, cause_of

# A run of fixed size waits at least this long for a node, as nodes come back from a reboot.
LOST_NODE_WAIT_S = 300.0
SAY_FIRST_S, SAY_EVERY_S = 5.0, 60.0
# Workers that can be placed start within this time.
START_S = 60.0
POLL_S = 0.5


class Stop(threading.Event):
    """A request to save and exit."""

    by_ctrl_c = False


@dataclass
class Limits:
    """Counts failures and preemptions against the recipe's limits.

    A new checkpoint since the last failure makes the next one the first. Ray Train's own limits
    are off: they count over the whole life of a run.
    """

    scaling: Scaling
    newest_step: int
    failures: int = 0

    def count(self, failure: Failure, newest_step: int) -> str:
        """Count a failure; returns a line for the user.

        Args:
            newest_step: of the newest checkpoint.

        Raises:
            DiffitError: restarting would not help, or there were too many.
        """
        if failure.final:
            raise DiffitError(failure.cause)
        if failure.preempted:
            return "Restarting the workers: their node was preempted"
        if newest_step > self.newest_step:
            self.newest_step, self.failures = newest_step, 0
        self.failures += 1
        most = self.scaling.max_failures
        since = f"since the checkpoint of step {self.newest_step:,}"
        if 0 <= most < self.failures:
            raise DiffitError(
                f"{failure.cause} (failures {since}: {self.failures}; scaling.max_failures is "
                f"{most})"
            )
        which = f"failure {self.failures}" + (f" of {most} allowed" if most >= 0 else "")
        return f"Restarting the workers: {failure.cause} ({which} {since})"


@dataclass
class Wait:
    """Limits how long a training waits for workers, and says what it waits for."""

    scaling: Scaling
    since_s: float = field(default_factory=time.monotonic)
    said_s: float | None = None

    def check(self, now_s: float, missing: str) -> str:
        """A line for the user if it is time for one, else an empty one.

        Args:
            missing: what the cluster lacks, in words.

        Raises:
            DiffitError: the wait has been too long.
        """
        waited_s, scaling = now_s - self.since_s, self.scaling
        elastic = scaling.min_workers != scaling.max_workers
        limit_s = float("inf") if elastic else max(LOST_NODE_WAIT_S, scaling.node_wait_timeout_s)
        what = (
            f"training needs {missing}"
            if missing
            else (
                "the cluster has the CPUs and GPUs that training needs, but they are in use or on "
                "a node that is shutting down"
            )
        )
        if waited_s > limit_s:
            raise DiffitError(
                f"{what}; waited {waited_s:.0f} s for another node; rerun the command to resume, "
                "with a larger scaling.node_wait_timeout_s, or with fewer scaling.workers"
            )
        first_s = SAY_FIRST_S if missing else START_S
        if waited_s < first_s or (self.said_s is not None and now_s - self.said_s < SAY_EVERY_S):
            return ""
        self.said_s = now_s
        until = "" if elastic else f" up to {limit_s - waited_s:.0f} s"
        return f"Waiting{until} for nodes: {what}"


class RayTraining:
    """Runs a training under Ray Train; the connected cluster has what it needs.

    Args:
        run: with its recipe.
        lease: of the run.
        mlflow_run_id: the MLflow run that rank 0 logs to.
        stop: set when training is to save and exit.
    """

    def __init__(self, run: Run, lease: Lease, mlflow_run_id: str, stop: Stop) -> None:
        self.run, self.scaling, self.stop = run, run.recipe.scaling, stop
        self._config = {"run": run, "mlflow_run_id": mlflow_run_id, "lease": lease}
        self._scratch, self._progress = storage.join(run.url, "ray"), lease.progress
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.coordinator: Any = Coordinator.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self._news = News({}, [], [], 0, False)
        self._lines = self._failures = 0
        self._growing = False
        self._tried_workers = 0
        self._grown_s = time.monotonic()

    def run_to_end(self) -> None:
        """Train to the end or a stop request.

        Raises:
            DiffitError: training failed more often than allowed, or no node came in time.
        """
        start = self.run.checkpoints.latest_step
        self._limits, self._wait = Limits(self.scaling, start), Wait(self.scaling)
        storage.remove(self._scratch)
        try:
            with Progress("train", self.run.recipe.train.steps, "steps", start) as progress:
                while not self._fit(progress, start):
                    pass
        finally:
            ray.kill(self.coordinator)
        storage.remove(self._scratch)

    def set_validated(self, step: int) -> None:
        """Note that no checkpoint up to this step awaits its evaluation."""
        self.coordinator.set_validated.remote(step)

    def _fit(self, progress: Progress, start: int) -> bool:
        """Run Ray Train once; whether training is over."""
        ref = self.coordinator.fit.remote(self.scaling, self._config, self._scratch)
        started_s, stopping, self._was_placed = time.monotonic(), False, False
        while not ray.wait([ref], timeout=POLL_S)[0]:
            self._take_news(progress)
            if "step" not in self._news.record:
                progress.update(start, f"({time.monotonic() - started_s:.0f} s)")
            if self.stop.is_set():
                if not self._news.workers:
                    return True  # nothing to save
                if not stopping:
                    stopping = True
                    again = "; Ctrl-C again quits at once" if self.stop.by_ctrl_c else ""
                    say(f"Stop requested; saving a checkpoint{again}")
                    self.coordinator.stop.remote()
            elif self._can_grow():
                self._growing = True
                say("Going on with more workers; saving a checkpoint first")
                self.coordinator.stop.remote()
        self._take_news(progress)
        try:
            ray.get(ref)
        except RayActorError as error:
            raise DiffitError(f"the process that runs Ray Train died: {cause_of(error)}") from error
        except RayError as error:  # the workers did not start
            no_room = not self._was_placed and time.monotonic() - started_s >= PLACEMENT_S
            if not no_room:
                self._count(Failure(cause_of(getattr(error, "cause", error))))
            return self.stop.is_set()
        if self._growing and not self.stop.is_set():
            self._growing = False
            ray.get(self.coordinator.resume.remote())
            return False
        return True

    def _take_news(self, progress: Progress) -> None:
        """Show what the workers have sent; count failures; limit waiting."""
        before, self._news = (
            self._news,
            ray.get(self.coordinator.news.remote(self._lines, self._failures)),
        )
        news = self._news
        self._lines += len(news.lines)
        self._failures += len(news.failures)
        for line in news.lines:
            say(line)
        for failure in news.failures:
            self._count(failure)
        if news.placed:
            self._wait, self._was_placed = Wait(self.scaling), True
        elif line := self._wait.check(
            time.monotonic(), missing_resources(*self.scaling.needs("train"))
        ):
            say(line)
        if "step" in news.record:
            if "step" not in before.record:
                progress.restart_clock()
            self._progress.update(news.record)
            progress.update(news.record["step"], loss_and_rate(news.record))

    def _count(self, failure: Failure) -> None:
        self._growing = False
        if not self.stop.is_set():
            newest = self.run.checkpoints.refresh().latest_step
            say(self._limits.count(failure, newest))

    def _can_grow(self) -> bool:
        """Whether an elastic run has room for more workers; each number is tried once."""
        scaling, workers = self.scaling, self._news.workers
        now_s = time.monotonic()
        if self._growing or not workers or workers >= scaling.max_workers:
            return False
        if now_s - self._grown_s < scaling.resize_check_s:
            return False
        self._grown_s = now_s
        room = min(scaling.max_workers, capacity(scaling))
        if room <= workers or room == self._tried_workers:
            return False
        self._tried_workers = room
        return True


def capacity(scaling: Scaling) -> int:
    """How many training workers the nodes of the connected cluster have resources for."""
    needs = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    needs = {kind: amount for kind, amount in needs.items() if amount}
    return sum(
        min(int(node["Resources"].get(kind, 0) // amount) for kind, amount in needs.items())
        for node in ray.nodes()
        if node["Alive"]
    )
