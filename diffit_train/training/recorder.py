"""Where training metrics go: log.jsonl, MLflow, the progress line; and step profiles."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.runs.checkpoints import LogMark
from diffit_train.runs.lease import LostLeaseError
from diffit_train.tracking import Curves
from diffit_train.training.control import TrainerHooks
from diffit_train.training.engine import learning_rate
from diffit_train.training.log import TrainingLog, as_metrics, mark_unsent
from diffit_train.training.telemetry import (
    PHASES,
    LossMeter,
    SpeedMeter,
    Stopwatch,
    peak_memory_bytes,
    slowest_rank,
)


class StepProfiler:
    """Profiles some steps of rank 0 with torch.profiler and stores the trace with the run.

    Args:
        steps: first and last step; None for none.
        url: folder of the run.
        say: told where the trace is.
    """

    def __init__(self, steps: tuple[int, int] | None, url: str, say: Callable[[str], None]) -> None:
        self.steps = steps if dist.get_rank() == 0 else None
        self.url, self.say = url, say
        self._profile: torch.profiler.profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the block if the step is to be profiled."""
        if self.steps is None or not self.steps[0] <= step <= self.steps[1]:
            yield
            return
        if self._profile is None:
            self._profile = torch.profiler.profile()
            self._profile.start()
        yield
        first, last = self.steps
        if step == last:
            self._profile.stop()
            url = storage.join(self.url, "profile", f"steps-{first}-{last}.json.gz")
            with tempfile.TemporaryDirectory(prefix="diffit-profile-") as folder:
                local = Path(folder) / "trace.json.gz"
                self._profile.export_chrome_trace(str(local))
                storage.write_bytes(url, local.read_bytes())
            self.say(f"Profile: {url}")


def _is_held(hooks: TrainerHooks) -> bool:
    """Whether no other command has taken over the run."""
    try:
        hooks.require_lease()
    except LostLeaseError:
        return False
    return True


class Recorder:
    """Averages an interval of steps into a log record and publishes it.

    All ranks measure; rank 0 keeps log.jsonl, sends points to MLflow and reports progress.

    Args:
        recipe: the run's recipe.
        url: the run's folder.
        mlflow_run_id: the MLflow run to log to.
        speed: the run's speed meter.
        device: where the model runs.
        hooks: told about each record.
        step: the current step; later records are dropped.
        mark: the checkpoint's mark of the log.
        begins: told of each phase of a step when it begins.
    """

    def __init__(
        self,
        recipe: Recipe,
        url: str,
        mlflow_run_id: str,
        speed: SpeedMeter,
        device: torch.device,
        hooks: TrainerHooks,
        step: int,
        mark: LogMark | None,
        begins: Callable[[str], None],
    ) -> None:
        self.recipe, self.url, self.hooks = recipe, url, hooks
        self.speed, self.device = speed, device
        self.losses = LossMeter(self.device)
        self.watch = Stopwatch(self.device, begins)
        self.log = TrainingLog(url, step, mark)
        self._grad_norm = float("nan")
        self._curves: Curves | None = None
        if dist.get_rank() == 0:
            # A restarted run repeats the steps after its checkpoint; MLflow has some of them.
            self._curves = Curves(recipe, mlflow_run_id, hooks.say, lambda: _is_held(hooks))
            for record in self.log.records:
                self._curves.put(record["step"], as_metrics(record))

    def add(self, losses: Tensor, noise_levels: Tensor, grad_norm: float) -> None:
        """Add a taken step: its losses, noise levels in [0, 1], and the gradient norm."""
        self._grad_norm = grad_norm
        self.losses.add(losses, noise_levels)

    def record(self, step: int, waited_s: float, checkpoint_s: float, bad_steps: int) -> None:
        """Record the interval that ends at `step` (collective).

        Args:
            waited_s: the loader's total wait so far.
            checkpoint_s: how long checkpoints blocked the interval.
            bad_steps: steps of the interval that were skipped.
        """
        train = self.recipe.train
        steps = step % train.log_every or train.log_every
        values = self.losses.reduce()
        waited_before_s = self.speed.waited_before_s
        values |= self.speed.measure(steps, waited_s)
        seconds = self.watch.take() | {"data": waited_s - waited_before_s}
        phases = {name: seconds.get(name, 0.0) / steps for name in PHASES}
        self.hooks.report_phases(phases)
        values["slowest_rank"], slowest = slowest_rank(phases, self.device)
        values |= {f"{name}_s": value for name, value in slowest.items()}
        values["checkpoint_s"] = checkpoint_s
        self.speed.restart(waited_s)
        if self._curves is None:
            return
        values["lr"] = learning_rate(train, step - 1)
        values["memory_gib"] = peak_memory_bytes(self.device) / storage.GIB
        if math.isfinite(self._grad_norm):
            values["grad_norm"] = self._grad_norm
        if bad_steps:
            values["skipped_steps"] = bad_steps
        record = {"step": step, **values}
        self.log.append(record)
        self._curves.put(step, as_metrics(record))
        self.hooks.report(record)

    def close(self) -> None:
        """Send the remaining points; leave a note in the run if MLflow is unreachable."""
        if self._curves is not None and not self._curves.close():
            mark_unsent(self.url)
