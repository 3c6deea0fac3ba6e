"""Where training metrics go: log.jsonl, MLflow, the progress line; and step profiles."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.runs.checkpoints import LogMark
from diffit_train.runs.lease import Lease, LostLeaseError
from diffit_train.tracking import Curves
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

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles some steps of rank 0 with torch.profiler and stores the trace with the run.

    Args:
        steps: first and last step; None for none.
        url: folder of the run.
    """

    def __init__(self, steps: tuple[int, int] | None, url: str) -> None:
        self.steps, self.url = steps if dist.get_rank() == 0 else None, url
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
            logger.info(f"Profile: {url}")


def _is_held(lease: Lease) -> bool:
    """Whether no other command has taken over the run."""
    try:
        lease.require()
    except LostLeaseError:
        return False
    return True


class Recorder:
    """Averages an interval of steps into a log record and publishes it.

    All ranks measure; rank 0 keeps log.jsonl, sends points to MLflow and reports progress.

    Args:
        recipe: the run's recipe.
        lease: of the run.
        mlflow_run_id: the MLflow run to log to.
        speed: the run's speed meter.
        device: where the model runs.
        step: the current step; later records are dropped.
        mark: the checkpoint's mark of the log.
    """

    def __init__(
        self,
        recipe: Recipe,
        lease: Lease,
        mlflow_run_id: str,
        speed: SpeedMeter,
        device: torch.device,
        step: int,
        mark: LogMark | None,
    ) -> None:
        self.recipe, self.url = recipe, lease.url
        self.speed, self.device = speed, device
        self.losses = LossMeter(self.device)
        self.watch = Stopwatch(self.device)
        self.log = TrainingLog(self.url, step, mark)
        self._grad_norm = float("nan")
        self._curves: Curves | None = None
        if dist.get_rank() == 0:
            # A restarted run repeats the steps after its checkpoint; MLflow has some of them.
            self._curves = Curves(recipe, mlflow_run_id, logger.info, lambda: _is_held(lease))
            for record in self.log.records:
                self._curves.put(record["step"], as_metrics(record))

    def add(self, losses: Tensor, noise_levels: Tensor, grad_norm: float) -> None:
        """Add a taken step: its losses, noise levels in [0, 1], and the gradient norm."""
        self._grad_norm = grad_norm
        self.losses.add(losses, noise_levels)

    def record(
        self, step: int, waited_s: float, checkpoint_s: float, bad_steps: int
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Record the interval that ends at `step` (collective).

        Args:
            waited_s: the loader's total wait so far.
            checkpoint_s: how long checkpoints blocked the interval.
            bad_steps: steps of the interval that were skipped.

        Returns:
            Seconds a step by phase of this rank; and the record, empty on other ranks than 0.
        """
        train = self.recipe.train
        steps = step % train.log_every or train.log_every
        values = self.losses.reduce()
        waited_before_s = self.speed.waited_before_s
        values |= self.speed.measure(steps, waited_s)
        seconds = self.watch.take() | {"data": waited_s - waited_before_s}
        phases = {name: seconds.get(name, 0.0) / steps for name in PHASES}
        values["slowest_rank"], slowest = slowest_rank(phases, self.device)
        values |= {f"{name}_s": value for name, value in slowest.items()}
        values["checkpoint_s"] = checkpoint_s
        self.speed.restart(waited_s)
        if self._curves is None:
            return phases, {}
        values["lr"] = learning_rate(train, step - 1)
        values["memory_gib"] = peak_memory_bytes(self.device) / storage.GIB
        if math.isfinite(self._grad_norm):
            values["grad_norm"] = self._grad_norm
        if bad_steps:
            values["skipped_steps"] = bad_steps
        record = {"step": step, **values}
        self.log.append(record)
        self._curves.put(step, as_metrics(record))
        return phases, record

    def close(self) -> None:
        """Send the remaining points; leave a note in the run if MLflow is unreachable."""
        if self._curves is not None and not self._curves.close():
            mark_unsent(self.url)
