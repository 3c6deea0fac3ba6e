"""Bad steps: a step with a non-finite or out-of-limit loss or gradient is skipped and reported.

After too many consecutive ones the run rolls back to its last checkpoint and skips their batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from diffit_train.data.loader import Batch
from diffit_train.runs.lease import Lease, LostLeaseError
from diffit_train.training.checkpointer import UnrecoverableError
from diffit_train.training.control import ControlPlane
from diffit_train.training.log import SkippedSteps, append_bad_step

logger = logging.getLogger(__name__)


def require_lease(lease: Lease, control: ControlPlane) -> None:
    """Stop all ranks if another command trains the run now (collective).

    Raises:
        UnrecoverableError: it does.
    """
    problem: list[str | None] = [None]
    if control.rank == 0:
        try:
            lease.require()
        except LostLeaseError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0, group=control.group)
    if problem[0]:
        raise UnrecoverableError(problem[0])


class RollbackRequested(Exception):
    """Too many consecutive bad steps: resume from the last checkpoint, skipping their batches."""


class BadStepGuard:
    """Counts consecutive bad steps, reports each, and requests rollbacks.

    Args:
        lease: of the run.
        control: this rank's control plane.
        wait_for_checkpoint: returns once no checkpoint is in progress.

    Attributes:
        skipped: steps whose batches are not trained on.
    """

    def __init__(
        self, lease: Lease, control: ControlPlane, wait_for_checkpoint: Callable[[], None]
    ) -> None:
        self.lease, self.url, self.control = lease, lease.url, control
        self.wait_for_checkpoint = wait_for_checkpoint
        self.skipped = SkippedSteps.read(self.url)
        self._consecutive: list[int] = []
        self._since_record = 0

    def record_ok(self) -> None:
        """Note that a step was taken."""
        self._consecutive = []

    def pop_count(self) -> int:
        """Bad steps since the last call."""
        count, self._since_record = self._since_record, 0
        return count

    def record_skip(self, batch: Batch, loss: float, grad_norm: float) -> None:
        """Note that a step was skipped, and list its samples in bad-steps.jsonl.

        Raises:
            RollbackRequested: too many consecutive bad steps; their batches will be skipped.
            UnrecoverableError: the same, with no rollbacks left.
        """
        control = self.control
        self._since_record += 1
        self._consecutive.append(batch.step)
        parts: list[Any] = [None] * control.world
        mine = {"shards": batch.shards, "keys": batch.keys.tolist()}
        dist.all_gather_object(parts, mine, group=control.group)
        if control.rank == 0:
            self._report(batch.step, loss, grad_norm, parts)
        if len(self._consecutive) < control.train.max_consecutive_bad_steps:
            return
        first, rollbacks = self._consecutive[0], len(self.skipped.ranges)
        if rollbacks >= control.train.max_rollbacks:
            raise UnrecoverableError(
                f"{len(self._consecutive)} consecutive steps from {first:,} had a non-finite or "
                f"out-of-limit loss or gradient ({rollbacks} rollbacks); see "
                f"{self.url}/bad-steps.jsonl; lower train.lr or set train.grad_clip in a new run, "
                "or raise train.max_rollbacks"
            )
        self.wait_for_checkpoint()
        require_lease(self.lease, control)
        if control.rank == 0:
            self.skipped.adding(first, batch.step).write(self.url)
        dist.barrier(group=control.group)
        raise RollbackRequested

    def _report(
        self, step: int, loss: float, grad_norm: float, parts: list[dict[str, Any]]
    ) -> None:
        shards = sorted({name for part in parts for name in part["shards"]})
        record = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "shards": shards,
            "keys": sorted(key for part in parts for key in part["keys"]),
        }
        append_bad_step(self.url, record)
        more = " …" if len(shards) > 4 else ""
        logger.info(
            f"Skipped step {step:,}: loss {loss:.4g}, gradient norm {grad_norm:.4g}; shards "
            f"{', '.join(shards[:4])}{more}; keys in {self.url}/bad-steps.jsonl"
        )
