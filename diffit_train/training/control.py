"""What the ranks agree on once per step, and the hooks to whoever runs the training."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from diffit_train.config.train import Train

# Seconds between checks for an announced preemption.
PREEMPTION_POLL_S = 1.0


class TrainerHooks(Protocol):
    """Callbacks from a rank's training to whoever runs it."""

    def report(self, record: dict[str, Any]) -> None:
        """Show a log record as progress; called on rank 0."""

    def say(self, text: str) -> None:
        """Show a line to the user; called on rank 0."""

    def stop_wanted(self) -> bool:
        """Whether training should save and exit; called on rank 0."""

    def preempted(self) -> bool:
        """Whether a node of this run is about to be preempted; called on all ranks together."""

    def validate(self, step: int) -> None:
        """Evaluate a committed checkpoint while training runs; called on all ranks together."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step; identical on every rank.

    Attributes:
        accept: whether the optimizer may take the step.
        loss: mean over the global batch.
        stop: save and exit.
        check_preemption: ask whether a node is about to be preempted.
        validate: step of a checkpoint to evaluate; 0 for none.
    """

    accept: bool
    loss: float
    stop: bool
    check_preemption: bool
    validate: int


class ControlPlane:
    """Agrees on stop, preemption, validation and step acceptance with one small reduction a step.

    Uses its own gloo group, separate from the GPUs' collectives. torch.distributed must be
    initialized; all ranks must make the same calls in the same order.

    Attributes:
        pending_validation: on rank 0, steps of committed checkpoints that await evaluation.
        stop: whether training was asked to save and exit.
        preempted: whether a preemption was announced and no checkpoint has been saved since.
    """

    def __init__(self, train: Train, hooks: TrainerHooks) -> None:
        self.train, self.hooks = train, hooks
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo")
        self.pending_validation: deque[int] = deque()
        self.stop = self.preempted = False
        self._saved_for_preemption = False
        self._polled_s = 0.0

    def decide(self, loss_sum: float, grad_norm: float) -> Decision:
        """Agree on a step after its backward pass and before the optimizer takes it.

        Args:
            loss_sum: loss summed over this rank's samples.
            grad_norm: global, before clipping; the same on every rank.
        """
        mine = torch.zeros(4, dtype=torch.float64)
        mine[0] = loss_sum / self.train.batch_size
        if self.rank == 0:
            mine[1] = self.hooks.stop_wanted()
            now_s = time.monotonic()
            if now_s - self._polled_s > PREEMPTION_POLL_S:
                self._polled_s = now_s
                mine[2] = 1.0
            mine[3] = self.pending_validation.popleft() if self.pending_validation else 0.0
        dist.all_reduce(mine, group=self.group)
        loss, stop, poll, validate = mine.tolist()
        return Decision(self._accepts(loss, grad_norm), loss, stop > 0, poll > 0, int(validate))

    def _accepts(self, loss: float, grad_norm: float) -> bool:
        train = self.train
        return (
            math.isfinite(loss)
            and math.isfinite(grad_norm)
            and (train.loss_limit is None or loss <= train.loss_limit)
            and (train.grad_norm_limit is None or grad_norm <= train.grad_norm_limit)
        )

    def follow(self, decision: Decision) -> None:
        """Act on the parts of a decision other than the step itself."""
        if decision.validate:
            self.hooks.validate(decision.validate)
        self.stop = self.stop or decision.stop
        if decision.check_preemption and not self._saved_for_preemption:
            self.preempted = self.hooks.preempted()

    def saved_for_preemption(self) -> None:
        """Note that a checkpoint was committed after the announcement; no need to save again."""
        self._saved_for_preemption, self.preempted = True, False

    def validate_pending(self) -> None:
        """Start the evaluation of every checkpoint that still awaits it."""
        pending: list[Any] = [list(self.pending_validation)]
        dist.broadcast_object_list(pending, group=self.group)
        for step in pending[0]:
            self.hooks.validate(step)
