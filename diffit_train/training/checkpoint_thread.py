"""A thread of the command that handles a run's checkpoints while training goes on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Self

import torch

from diffit_train import storage
from diffit_train.errors import DiffitError, first_line
from diffit_train.progress import say
from diffit_train.runs.checkpoints import Checkpoints
from diffit_train.runs.run import Run

# Seconds between looks for a new checkpoint.
LOCAL_POLL_S, REMOTE_POLL_S = 1.0, 5.0
# How long a stopping command waits for what has begun.
LEAVE_S = 1.0
# Threads of torch, where the workers do not train on the CPU.
GPU_RUN_THREADS = 4


class CheckpointThread:
    """Handles each checkpoint that is due while the block runs.

    After the block, those still due are handled, unless it raised or training is to stop. A failure
    is reported, and training goes on.

    Args:
        run: whose checkpoints.
        due: which of the committed steps are due.
        handle: handles one; called once for each step.
        what: what it does, such as "draw samples of".
        stop: set when training is to stop.
        on_cpu: whether the training itself runs on CPUs.
    """

    def __init__(
        self,
        run: Run,
        due: Callable[[Iterable[int]], list[int]],
        handle: Callable[[int], None],
        what: str,
        stop: threading.Event,
        on_cpu: bool,
    ) -> None:
        self.url, self.due, self.handle, self.what = run.url, due, handle, what
        self.stop, self.on_cpu = stop, on_cpu
        self._ended = threading.Event()
        self._handled: set[int] = set()
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

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
        poll_s = LOCAL_POLL_S if storage.is_local(self.url) else REMOTE_POLL_S
        while not self._ended.wait(poll_s):
            self._handle_due()
        self._handle_due()

    def _handle_due(self) -> None:
        try:
            steps = self.due(Checkpoints(self.url))
        except (DiffitError, OSError) as error:
            say(f"Could not list checkpoints: {first_line(error)}")
            return
        for step in steps:
            if self._leaving or self.stop.is_set():
                return
            if step in self._handled:
                continue
            self._handled.add(step)
            try:
                self.handle(step)
            except (DiffitError, OSError, RuntimeError, ValueError) as error:
                say(f"Could not {self.what} step {step:,}: {first_line(error)}")
