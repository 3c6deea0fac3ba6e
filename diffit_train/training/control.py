"""What the ranks agree on once per step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from diffit_train.config.train import Train
from diffit_train.training.engine import positive_norm

# Seconds between checks for an announced preemption.
PREEMPTION_POLL_S = 1.0


@dataclass
class Requests:
    """What whoever runs the training asks of it; only rank 0's count.

    Attributes:
        stop: save and exit.
        watch_preemption: let the ranks look together, regularly, for an announced preemption.
        validated: no checkpoint up to this step awaits an evaluation.
    """

    stop: bool = False
    watch_preemption: bool = False
    validated: float = math.inf


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step; identical on every rank.

    Attributes:
        accept: whether the optimizer may take the step.
        loss: mean over the global batch.
        grad_norm: global, before clipping.
        stop: save and exit.
        check_preemption: look whether a node is about to be preempted.
        save: write a checkpoint, as none was for `checkpoint_every_s`.
    """

    accept: bool
    loss: float
    grad_norm: float
    stop: bool
    check_preemption: bool
    save: bool


class ControlPlane:
    """Agrees on requests and step acceptance with one small reduction a step.

    torch.distributed must be initialized; all ranks must make the same calls in the same order.
    Rare calls use a separate gloo group, apart from the GPUs' collectives.
    """

    def __init__(self, train: Train, requests: Requests) -> None:
        self.train, self.requests = train, requests
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo")
        self._polled_s = 0.0
        self._save_due_s = math.inf
        self.saved()

    def saved(self) -> None:
        """Note that a checkpoint begins: the next one by time is due `checkpoint_every_s` later."""
        if self.train.checkpoint_every_s is not None:
            self._save_due_s = time.monotonic() + self.train.checkpoint_every_s

    def decide(self, loss_sum: Tensor, grad_norm: Tensor) -> Decision:
        """Agree on a step after its backward pass and before the optimizer takes it.

        The loss, the gradient norm and rank 0's flags are reduced on the device, and read from it
        once.

        Args:
            loss_sum: loss summed over this rank's samples, float64.
            grad_norm: global, before clipping; the same on every rank; negative if not finite; on
                any device.
        """
        flags = torch.zeros(3, dtype=torch.float64)
        if self.rank == 0:
            now_s = time.monotonic()
            flags[0] = self.requests.stop
            if self.requests.watch_preemption and now_s - self._polled_s > PREEMPTION_POLL_S:
                self._polled_s = now_s
                flags[1] = 1.0
            flags[2] = now_s >= self._save_due_s
        if loss_sum.is_cuda:  # from pinned memory, the copy does not wait for the device
            flags = flags.pin_memory().to(loss_sum.device, non_blocking=True)
        shared = torch.cat([(loss_sum / self.train.batch_size).view(1), flags])
        dist.all_reduce(shared)
        norms = grad_norm.to(shared.device, torch.double).view(1)  # on the CPU with offload
        read = torch.cat([shared, norms]).to("cpu", copy=True)
        loss, stop, check, save, norm = read.tolist()
        norm = positive_norm(norm)
        return Decision(self._accepts(loss, norm), loss, norm, stop > 0, check > 0, save > 0)

    def _accepts(self, loss: float, grad_norm: float) -> bool:
        train = self.train
        return (
            math.isfinite(loss)
            and math.isfinite(grad_norm)
            and (train.loss_limit is None or loss <= train.loss_limit)
            and (train.grad_norm_limit is None or grad_norm <= train.grad_norm_limit)
        )
