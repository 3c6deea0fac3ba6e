"""The thread that draws grids of samples beside a training, in the process that started it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Protocol, Self

import torch

from diffit_train.errors import DiffitError
from diffit_train.redaction import first_line
from diffit_train.runs.checkpoints import committed_steps
from diffit_train.tracking import unreachable_errors

# Seconds between looks for a new checkpoint.
POLL_S = 1.0
# How long a command that was told to stop waits for a grid that is being drawn.
LEAVE_S = 1.0
# Threads of torch, where the workers do not train on the CPU.
GPU_RUN_THREADS = 4


class Samples(Protocol):
    """What draws a run's grids; see `evaluation.training_samples`."""

    def due(self, steps: Iterable[int]) -> list[int]:
        """Those of the checkpoints at `steps` whose grid is to be drawn."""

    def draw(self, step: int) -> None:
        """Draw the grid of a checkpoint."""

    def send(self, mlflow_run_id: str) -> None:
        """Log the grids that the MLflow run lacks."""


class SampleThread:
    """Draws the grid of each checkpoint that is due, and logs it, while the block runs.

    After the block, the grids still due are drawn, unless it raised or was told to stop. Whatever
    fails is logged, and training goes on.

    Args:
        url: folder of the run.
        newest: step of the newest checkpoint; asked about once a second.
        stop: set when training was told to stop.
        on_cpu: whether the training itself runs on CPUs.
    """

    def __init__(
        self,
        samples: Samples,
        url: str,
        mlflow_run_id: str,
        newest: Callable[[], int],
        stop: threading.Event,
        say: Callable[[str], None],
        on_cpu: bool,
    ) -> None:
        self.samples, self.url, self.mlflow_run_id = samples, url, mlflow_run_id
        self.newest, self.stop, self.say, self.on_cpu = newest, stop, say, on_cpu
        self._ended = threading.Event()
        self._failed: set[int] = set()
        self._away = self._leaving = False
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._leaving = kind is not None or self.stop.is_set()
        self._ended.set()
        self._thread.join(LEAVE_S if self._leaving else None)

    def _run(self) -> None:
        # Both hold for this thread and those that it starts; Ray's workers have a niceness of 15.
        torch.set_num_threads(1 if self.on_cpu else GPU_RUN_THREADS)
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        seen = None
        while not self._ended.wait(POLL_S):
            newest = self.newest()
            if newest != seen:
                seen = newest
                self._draw_due()
        self._draw_due()

    def _draw_due(self) -> None:
        for step in self.samples.due(committed_steps(self.url)):
            if self._leaving or self.stop.is_set():
                return
            if step in self._failed:
                continue
            try:
                self.samples.draw(step)
            except (DiffitError, OSError, RuntimeError, ValueError) as error:
                self._failed.add(step)
                self.say(f"Could not draw samples of step {step:,}: {first_line(error)}")
            else:
                self._send()

    def _send(self) -> None:
        try:
            self.samples.send(self.mlflow_run_id)
        except unreachable_errors() as error:
            if not self._away:
                self.say(f"Could not log samples to MLflow; they are kept: {first_line(error)}")
            self._away = True
        else:
            self._away = False
