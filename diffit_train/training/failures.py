"""Why workers fail, and how often they may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ray.exceptions import RayActorError

from diffit_train.config.scaling import Scaling
from diffit_train.errors import DiffitError


class Failure(NamedTuple):
    """Why a worker group failed.

    Attributes:
        cause: one line.
        final: restarting the workers would not help.
        preempted: Ray had announced the end of a node.
    """

    cause: str
    final: bool = False
    preempted: bool = False


@dataclass
class Limits:
    """Counts failures against `scaling.max_failures`; preemptions are none.

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


def cause_of(error: BaseException) -> str:
    """The last line of the innermost failure: the actual error."""
    failures = getattr(error, "worker_failures", None) or {}
    text = str(next(iter(failures.values()), error))
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def was_preempted(error: BaseException) -> bool:
    """Whether a worker has died because Ray had announced the end of its node."""
    cause = getattr(error, "health_check_failure", error)
    return isinstance(cause, RayActorError) and cause.preempted
