"""Training under Ray Train, as the command sees it: progress, failures, waiting, growth."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayActorError, RayTaskError

from diffit_train import storage
from diffit_train.config.scaling import Scaling
from diffit_train.errors import DiffitError
from diffit_train.progress import Progress, loss_and_rate, say
from diffit_train.ray_session import missing_resources
from diffit_train.runs.lease import Lease
from diffit_train.runs.run import Run
from diffit_train.training.coordinator import PLACEMENT_S, News, start_coordinator
from diffit_train.training.failures import Failure, cause_of

# A run of fixed size waits at least this long for a node, as nodes come back from a reboot.
LOST_NODE_WAIT_S = 300.0
SAY_FIRST_S, SAY_EVERY_S = 5.0, 60.0
# Workers that can be placed start within this time.
START_S = 60.0
POLL_S = 0.5
# Ray Train asks what has counted a new node within 20 s.
NODE_KNOWN_S = 25.0
# Checks left out after workers were started again for more of them.
RETRY_CHECKS = 10


class Stop(threading.Event):
    """A request to save and exit."""

    by_ctrl_c = False


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
        self.coordinator = start_coordinator()
        self._news, self._lines = News({}, [], 0, False), 0
        self._growing = False
        self._room, self._room_since_s = 0, 0.0
        self._grown_s = time.monotonic()

    def run_to_end(self) -> None:
        """Train to the end or a stop request.

        Raises:
            DiffitError: training failed more often than allowed, or no node came in time.
        """
        start = self.run.checkpoints.latest_step
        self._wait = Wait(self.scaling)
        storage.remove(self._scratch)
        try:
            with Progress("train", self.run.recipe.train.steps, "steps", start) as progress:
                while not self._fit(progress, start):
                    pass
        except RayActorError as error:
            raise self._failed(
                f"the process that runs Ray Train died: {cause_of(error)}"
            ) from error
        finally:
            ray.kill(self.coordinator)
        storage.remove(self._scratch)

    def set_validated(self, step: int) -> None:
        """Note that no checkpoint up to this step awaits its evaluation."""
        self.coordinator.set_validated.remote(step)

    def _fit(self, progress: Progress, start: int) -> bool:
        """Run Ray Train once; whether training is over."""
        ref = self.coordinator.fit.remote(self._config, self._scratch)
        started_s, stopping, self._was_placed = time.monotonic(), False, False
        while not ray.wait([ref], timeout=POLL_S)[0]:
            self._take_news(progress)
            if "step" not in self._news.record:
                progress.update(start, f"({time.monotonic() - started_s:.0f} s)")
            if self.stop.is_set():
                if not self._news.workers:
                    say("No workers are running, so there is nothing to save")
                    return True
                if not stopping:
                    stopping = True
                    again = "; Ctrl-C again quits at once" if self.stop.by_ctrl_c else ""
                    say(f"Stop requested; saving a checkpoint{again}")
                    self.coordinator.stop.remote()
            elif self._can_grow():
                self._growing = True
                say(f"Going on with {self._room} workers; saving a checkpoint first")
                self.coordinator.stop.remote()
        self._take_news(progress)
        try:
            ray.get(ref)
        except RayTaskError as error:
            self._growing = False
            if self._news.reason:
                raise self._failed(self._news.reason) from error
            if self.stop.is_set():
                return True
            # The workers did not start, if not for lack of room.
            if self._was_placed or time.monotonic() - started_s < PLACEMENT_S:
                failure = Failure(cause_of(getattr(error, "cause", error)))
                if reason := ray.get(self.coordinator.fail.remote(failure)):
                    raise self._failed(reason) from error
            return False
        if self._growing and not self.stop.is_set():
            self._growing = False
            ray.get(self.coordinator.resume.remote())
            return False
        return True

    def _failed(self, reason: str) -> DiffitError:
        return DiffitError(f"training of {self.run.name!r} failed: {reason}")

    def _take_news(self, progress: Progress) -> None:
        """Show what the workers have sent, and limit waiting."""
        before, news = self._news, ray.get(self.coordinator.news.remote(self._lines))
        self._news, self._lines = news, self._lines + len(news.lines)
        for line in news.lines:
            say(line)
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

    def _can_grow(self) -> bool:
        """Whether an elastic run has room for more workers.

        Where others use the room, so that an attempt was in vain, the next one comes later.
        """
        scaling, workers = self.scaling, self._news.workers
        now_s = time.monotonic()
        if self._growing or not workers or workers >= scaling.max_workers:
            return False
        if now_s - self._grown_s < scaling.resize_check_s:
            return False
        self._grown_s = now_s
        room = min(scaling.max_workers, capacity(scaling))
        if room != self._room:
            self._room, self._room_since_s = room, now_s
        if room <= workers or now_s - self._room_since_s < NODE_KNOWN_S:
            return False
        self._room_since_s = now_s + RETRY_CHECKS * scaling.resize_check_s
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
