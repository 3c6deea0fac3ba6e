"""What the ranks of a training agree on once a step, and what they hear from and tell outside."""

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
    """What a rank's training hears from, and tells, whoever runs it."""

    def report(self, record: dict[str, Any]) -> None:
        """A record of the log, on rank 0, for the progress line."""

    def say(self, text: str) -> None:
        """A line for the user, on rank 0."""

    def stop_wanted(self) -> bool:
        """Whether training should save and leave; asked on rank 0."""

    def preempted(self) -> bool:
        """Whether a node of this run will be taken away; all ranks ask together."""

    def validate(self, step: int) -> None:
        """Evaluate a committed checkpoint next to training; all ranks call it together."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step; the same on each.

    Attributes:
        accept: whether the optimizer may take the step.
        loss: mean over the global batch.
        stop: save and leave.
        check_preemption: ask whether a node will be taken away.
        validate: step of a checkpoint to evaluate; 0 for none.
    """

    accept: bool
    loss: float
    stop: bool
    check_preemption: bool
    validate: int


class ControlPlane:
    """Stop, preemption, validation and the accept step, agreed on by one small reduction a step.

    It has a gloo group of its own, apart from the GPUs' collectives. torch.distributed must be
    initialized; all ranks must make the same calls in the same order.

    Attributes:
        pending_validation: on rank 0, steps whose checkpoints are committed and await evaluation.
        stop: whether training was asked to save and leave.
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
        """Agree on a step that has its gradients but has not been taken.

        Args:
            loss_sum: over this rank's samples.
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
        """Do what was decided besides the step itself."""
        if decision.validate:
            self.hooks.validate(decision.validate)
        self.stop = self.stop or decision.stop
        if decision.check_preemption and not self._saved_for_preemption:
            self.preempted = self.hooks.preempted()

    def saved_for_preemption(self) -> None:
        """A checkpoint was committed after the announcement; the run need not save again."""
        self._saved_for_preemption, self.preempted = True, False

    def validate_pending(self) -> None:
        """Hand over every checkpoint that still awaits evaluation."""
        pending: list[Any] = [list(self.pending_validation)]
        dist.broadcast_object_list(pending, group=self.group)
        for step in pending[0]:
            self.hooks.validate(step)
