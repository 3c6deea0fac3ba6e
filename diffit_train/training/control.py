"""What the ranks agree on once per step, and the hooks to whoever runs the training."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from diffit_train.config.train import Train
from diffit_train.training.engine import positive_norm

# Seconds between checks for an announced preemption.
PREEMPTION_POLL_S = 1.0


class TrainerHooks(Protocol):
    """Callbacks from a rank's training to whoever runs it."""

    def report(self, record: dict[str, Any]) -> None:
        """Show a log record as progress; called on rank 0."""

    def doing(self, what: str, slow: bool = False) -> None:
        """Note what this rank begins, and thereby that it goes on; called on every rank, often.

        Args:
            slow: it may take several times as long as a step.
        """

    def report_phases(self, seconds: Mapping[str, float]) -> None:
        """Show what a step of this rank takes, by phase; called on every rank."""

    def require_lease(self) -> None:
        """Raise LostLeaseError if another command trains the run now; called on rank 0."""

    def saved(self, step: int) -> None:
        """Note that a checkpoint was committed; called on rank 0, in a thread."""

    def say(self, text: str) -> None:
        """Show a line to the user; called on rank 0."""

    def should_stop(self) -> bool:
        """Whether training should save and exit; called on rank 0."""

    def should_resize(self) -> bool:
        """Whether this worker group is about to be replaced by one of another size; on rank 0."""

    def await_resize(self, saved: bool) -> None:
        """Wait to be replaced if a checkpoint was saved for it; called on all ranks together.

        Returns only if training is to go on.
        """

    def preempted(self) -> bool:
        """Whether a node of this run is about to be preempted; called on all ranks together."""

    def validate(self, step: int) -> None:
        """Evaluate a committed checkpoint while training runs; called on all ranks together."""

    def validating(self) -> set[int]:
        """Steps whose evaluation was started and has not ended; called on rank 0, in a thread."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step; identical on every rank.

    Attributes:
        accept: whether the optimizer may take the step.
        loss: mean over the global batch.
        grad_norm: global, before clipping.
        stop: save and exit.
        check_preemption: ask whether a node is about to be preempted.
        validate: step of a checkpoint to evaluate; 0 for none.
        save: write a checkpoint, as none was for `checkpoint_every_s`.
        resize: write a checkpoint and wait to be replaced by another number of workers.
    """

    accept: bool
    loss: float
    grad_norm: float
    stop: bool
    check_preemption: bool
    validate: int
    save: bool = False
    resize: bool = False


class ControlPlane:
    """Agrees on stop, preemption, validation and step acceptance with one small reduction a step.

    torch.distributed must be initialized; all ranks must make the same calls in the same order.
    Rare calls use a gloo group of their own, separate from the GPUs' collectives.

    Attributes:
        pending_validation: on rank 0, steps of committed checkpoints that await evaluation.
        stop: whether training was asked to save and exit.
        preempted: whether a preemption was announced and no checkpoint has been saved since.
        save_due: whether a checkpoint is due by time.
        resizing: whether this worker group is about to be replaced by one of another size.
    """

    def __init__(self, train: Train, hooks: TrainerHooks) -> None:
        self.train, self.hooks = train, hooks
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo")
        self.pending_validation: deque[int] = deque()
        self.stop = self.preempted = self.save_due = self.resizing = False
        self._saved_for_preemption = False
        self._polled_s = 0.0
        self._starting = 0
        self._save_due_s = math.inf
        self.saved()

    def saved(self) -> None:
        """Note that a checkpoint begins: the next one by time is due `checkpoint_every_s` later."""
        if self.train.checkpoint_every_s is not None:
            self._save_due_s = time.monotonic() + self.train.checkpoint_every_s

    def awaiting_validation(self) -> set[int]:
        """On rank 0, steps of the checkpoints whose evaluation has not ended."""
        return {*self.pending_validation, self._starting, *self.hooks.validating()}

    def decide(self, loss_sum: Tensor, grad_norm: Tensor) -> Decision:
        """Agree on a step after its backward pass and before the optimizer takes it.

        The loss, the gradient norm and rank 0's flags are reduced on the device, and read from it
        once.

        Args:
            loss_sum: loss summed over this rank's samples, float64.
            grad_norm: global, before clipping; the same on every rank; negative if not finite; on
                any device.
        """
        flags = torch.zeros(5, dtype=torch.float64)
        if self.rank == 0:
            flags[0] = self.hooks.should_stop()
            now_s = time.monotonic()
            if now_s - self._polled_s > PREEMPTION_POLL_S:
                self._polled_s = now_s
                flags[1] = 1.0
            self._starting = self.pending_validation[0] if self.pending_validation else 0
            if self._starting:
                flags[2] = self.pending_validation.popleft()
            flags[3] = now_s >= self._save_due_s
            flags[4] = self.hooks.should_resize()
        if loss_sum.is_cuda:  # from pinned memory, the copy does not wait for the device
            flags = flags.pin_memory().to(loss_sum.device, non_blocking=True)
        shared = torch.cat([(loss_sum / self.train.batch_size).view(1), flags])
        dist.all_reduce(shared)
        norms = grad_norm.to(shared.device, torch.double).view(1)  # on the CPU with offload
        read = torch.cat([shared, norms]).to("cpu", copy=True)
        loss, stop, poll, validate, save, resize, norm = read.tolist()
        norm = positive_norm(norm)
        return Decision(
            accept=self._accepts(loss, norm),
            loss=loss,
            grad_norm=norm,
            stop=stop > 0,
            check_preemption=poll > 0,
            validate=int(validate),
            save=save > 0,
            resize=resize > 0,
        )

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
        self.save_due, self.resizing = decision.save, decision.resize
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
