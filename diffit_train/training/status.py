"""The status actor of a training: what driver, supervisor and workers tell each other.

Its process imports this module, and with it neither torch nor Ray Train.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ray

from diffit_train.progress import counted


class Polled(NamedTuple):
    """What rank 0 of the workers asks for regularly.

    Attributes:
        stopping: save and exit.
        resizing: save and wait to be replaced.
        validating: steps whose evaluation was handed to Ray Train.
        validated: those whose evaluation has ended.
    """

    stopping: bool
    resizing: bool
    validating: set[int]
    validated: set[int]


@ray.remote(num_cpus=0)
class TrainingStatus:
    """Shared by driver and workers: rank 0's newest record, and the driver's stop request."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}
        self.lines: list[str] = []
        self.groups = 0
        self.stopping = False
        self.failure = ""
        self.validating: set[int] = set()
        self.validated: set[int] = set()
        self.newest = -1
        self.resizing = False
        self.stall = ""

    def begin_group(self, workers: int) -> None:
        """Note that a new worker group has started."""
        started = counted(workers, "worker has", "workers have")
        self.say(f"{started} started; loading the model")

    def note_stall(self, reason: str) -> None:
        """Note why a rank is about to exit; its peers stall because of the first."""
        self.stall = self.stall or reason

    def pop_stall(self) -> str:
        """Why ranks have exited, once; empty if none has stalled."""
        reason, self.stall = self.stall, ""
        return reason

    def put(self, record: dict[str, Any]) -> None:
        """Take over the values of a record."""
        self.record = {**self.record, **record}

    def say(self, line: str) -> None:
        """Add a line for the user."""
        self.lines.append(line)

    def begin(self, workers: int, step: int) -> None:
        """Note that a worker group has started training."""
        self.groups += 1
        verb = "Resuming" if self.groups > 1 else "Training"
        self.say(f"{verb} from step {step:,} on {counted(workers, 'worker')}")

    def fail(self, reason: str) -> None:
        """Note an unrecoverable error; restarting the workers would not help."""
        self.failure = reason

    def why_failed(self) -> str:
        """The unrecoverable error; empty if there was none."""
        return self.failure

    def read(self, seen: int) -> tuple[dict[str, Any], list[str]]:
        """The newest record, and all lines after the first `seen`."""
        return self.record, self.lines[seen:]

    def stop(self) -> None:
        """Ask the workers to save and exit."""
        self.stopping = True

    def should_stop(self) -> bool:
        """Whether the workers were asked to save and exit."""
        return self.stopping

    def saved(self, step: int) -> None:
        """Note that a checkpoint was committed."""
        self.newest = max(self.newest, step)

    def newest_checkpoint(self) -> int:
        """Step of the newest checkpoint of this attempt; -1 if there is none."""
        return self.newest

    def request_resize(self) -> None:
        """Ask the workers to save and wait to be replaced."""
        self.resizing = True

    def answer_resize(self) -> None:
        """Note that they have, or could not, or that nobody waits for it any longer."""
        self.resizing = False

    def resize_answered(self) -> bool:
        """Whether no answer is outstanding."""
        return not self.resizing

    def begin_validation(self, step: int) -> None:
        """Note that the evaluation of a checkpoint was handed to Ray Train."""
        self.validating.add(step)

    def end_validation(self, step: int) -> None:
        """Note that it has ended, well or not."""
        self.validated.add(step)

    def poll(self) -> Polled:
        """What rank 0 must know."""
        return Polled(self.stopping, self.resizing, self.validating, self.validated)
