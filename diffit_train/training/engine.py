"""DeepSpeed ZeRO around a plain model: partitions, optimizer step, learning rate."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffit_train.checkpoints import Slice
from diffit_train.config.recipe import Train
from diffit_train.errors import DiffitError
from diffit_train.training.ema import ShardedEMA

# Elements that are reduced or gathered at once.
BUCKET_ELEMENTS = 50_000_000


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of a step, a pure function of the recipe: linear rise, then the schedule."""
    rise = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if train.lr_schedule == "constant":
        return train.lr * rise
    return train.lr * rise * 0.5 * (1.0 + math.cos(math.pi * step / train.steps))


@dataclass(frozen=True)
class Partition:
    """One parameter group's flat tensors on this rank, and which stretch of what lies where."""

    master: Tensor
    ema: Tensor
    pieces: list[tuple[Slice, int]]  # the stretch of a parameter, and its start in `master`


class Engine:
    """A model under ZeRO stage 1 or 2, with its AdamW and its sharded EMA.

    torch.distributed must be initialised. The model must have the same weights on every rank.

    Args:
        model: a single-device module; its forward is (x, t, y).
        train: the recipe's section.
        world_size: number of ranks; it must divide the batch.
        device: where the model runs.
    """

    def __init__(
        self, model: nn.Module, train: Train, world_size: int, device: torch.device
    ) -> None:
        self.train, self.device = train, device
        deepspeed = _quiet_deepspeed(device)
        self.shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_deepspeed_config(train, world_size)
        )
        self.dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.ema = ShardedEMA(list(self.optimizer.single_partition_of_fp32_groups), train.ema_decay)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output in fp32."""
        autocast = self.train.precision == "bf16_autocast"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            return self.engine(x.to(self.dtype), t, y).float()

    def step(self, loss: Tensor, step: int) -> None:
        """Backward, optimizer step at this step's learning rate, EMA.

        Args:
            loss: mean over this rank's part of the batch; ranks hold equal parts.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, step)
        self.engine.backward(loss)
        self.engine.step()
        self.ema.update()

    def grad_norm(self) -> float:
        """L2 norm of the last global gradient, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    # ---- State, by the stretches that this rank owns ----

    def partitions(self) -> Iterator[Partition]:
        """This rank's part of every parameter group."""
        mappings = [
            {name: parameter._hp_mapping for parameter, name in self._named(group)}
            for group in self.optimizer.bit16_groups
        ]
        for master, ema, mapping in zip(self.ema.sources, self.ema.averages, mappings, strict=True):
            pieces = [
                (
                    Slice(name, part.lp_fragment_address.start, part.lp_fragment_address.numel),
                    part.hp_fragment_address.start,
                )
                for name, part in mapping.items()
                if part is not None  # wholly on other ranks
            ]
            yield Partition(master, ema, pieces)

    def _named(self, group: list[nn.Parameter]) -> Iterator[tuple[Any, str]]:
        for parameter in group:
            yield parameter, self.optimizer.param_names[parameter]

    def moments(self, master: Tensor) -> tuple[Tensor, Tensor]:
        """Adam's two moments of a flat partition; zero before the first step."""
        state = self.optimizer.optimizer.state.get(master, {})
        if "exp_avg" not in state:
            return torch.zeros_like(master), torch.zeros_like(master)
        return state["exp_avg"], state["exp_avg_sq"]

    def optimizer_steps(self) -> int:
        """How often Adam has stepped, its bias correction's count."""
        steps = {int(s["step"]) for s in self.optimizer.optimizer.state.values() if "step" in s}
        if len(steps) > 1:
            raise DiffitError(f"Adam's parameter groups disagree on their step: {sorted(steps)}")
        return steps.pop() if steps else 0

    def set_moments(self, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: int) -> None:
        """Put Adam where it stood after `steps` steps."""
        self.optimizer.optimizer.state[master] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
        }


def _deepspeed_config(train: Train, world_size: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's own bucket is ten times as large and takes 2 GB on every rank in fp32.
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        "steps_per_print": 10**9,
    }
    if train.grad_clip is not None:
        config["gradient_clipping"] = train.grad_clip
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def _quiet_deepspeed(device: torch.device) -> Any:
    # DeepSpeed picks its accelerator when it is imported; a CPU run must not take a GPU nearby.
    os.environ["DS_ACCELERATOR"] = "cpu" if device.type == "cpu" else device.type
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed would compile a shared-memory all-reduce for CPUs, at every start where the
    # extension cache is cold, for the better part of a minute; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
