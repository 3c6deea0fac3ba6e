"""DeepSpeed ZeRO around a plain model: owned slices, optimizer step, learning rate, EMA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from diffit_train.config.train import BUCKET_ELEMENTS, Train
from diffit_train.errors import DiffitError
from diffit_train.models.wrap import autocast_forward
from diffit_train.runs.checkpoints import OwnedSlice, Slice, StateName
from diffit_train.training.ema import ShardedEMA
from diffit_train.training.zero import FlatSlice, Zero, import_deepspeed

# From a step's gradient norm on the device, negative or not finite where a gradient is not finite:
# whether to take the step, and the norm, read from the device; all ranks must return the same.
AcceptStep = Callable[[Tensor], tuple[bool, float]]


def positive_norm(norm: float) -> float:
    """A gradient norm, which DeepSpeed reports as -1 if it is not finite."""
    return norm if norm >= 0.0 else math.inf


def accept_finite(norm: Tensor) -> tuple[bool, float]:
    """Take every step with finite gradients."""
    value = positive_norm(float(norm))
    return math.isfinite(value), value


def learning_rate(train: Train, step: int) -> float:
    """Learning rate at a step, a pure function of the recipe: linear warmup times the schedule."""
    warmup = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    lr = train.lr * warmup
    if train.lr_schedule == "cosine":
        return lr * 0.5 * (1.0 + math.cos(math.pi * step / train.steps))
    if train.lr_schedule == "inverse_sqrt":
        return lr / math.sqrt(max(1.0, step / train.lr_decay_start))
    return lr


class Engine:
    """A model under ZeRO stage 0 to 3, with AdamW and sharded EMA.

    torch.distributed must be initialized. The model must have the same weights on every rank.

    Args:
        model: a single-device module; its forward is (x, t, y).
        train: the recipe's `train` section.
        rank: this process's rank.
        world_size: number of processes.
        device: where the model runs.
        micro_batches: backward passes per step.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        rank: int,
        world_size: int,
        device: torch.device,
        micro_batches: int = 1,
    ) -> None:
        self.train, self.device, self.micro_batches = train, device, micro_batches
        self.rank, self.world_size = rank, world_size
        deepspeed = import_deepspeed(device)
        self._linear = functional.linear
        self.names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.shapes = {n: p.shape for p, n in self.names.items()}
        self.base_optimizer = torch.optim.AdamW(
            list(self.names),
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        if train.precision == "bf16_autocast":
            # Inside the model, because DeepSpeed turns off autocast that is entered outside of it.
            # Its own `torch_autocast` would reduce the gradients of linear layers in bf16, in
            # buckets apart from the others'.
            autocast_forward(model, device)
        exact = self._exact_weights() if train.precision == "bf16" else {}
        self.engine, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self.base_optimizer,
            config=_deepspeed_config(
                train, sum(p.numel() for p in self.names), micro_batches, device
            ),
        )
        self._norm = float("nan")
        self._accept: AcceptStep = accept_finite
        self.zero = Zero(optimizer, train.zero_stage, rank, self.names)
        if train.zero_stage:
            self.zero.check_norm(self._checked)
        # At stage 0 the parameters are their own master weights and hold Adam's state.
        replicas = list(self.names) if train.zero_stage == 0 else []
        self._replicas = [(p.detach().view(-1), self.names[p]) for p in replicas]
        owners = zip(self._replicas, replicas, strict=True)
        self._flat_owner = {id(flat): parameter for (flat, _), parameter in owners}
        stage0 = train.zero_stage == 0
        self._owned = list(self._shares_of_replicas(rank) if stage0 else self.zero.owned())
        self._start_moments()
        masters = [self._adam_values(part)["master"] for part in self._owned]
        if exact:
            for part, master in zip(self._owned, masters, strict=True):
                start, length = part.slice.offset, part.slice.length
                master.copy_(exact[part.slice.name].narrow(0, start, length))
        self.ema = ShardedEMA(masters, train.ema, train.batch_size)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, **extras: Tensor) -> Tensor:
        """The model's output in fp32, for noisy latents x in fp32, which are never rounded."""
        return cast(Tensor, self.engine(x, t, y, **extras)).float()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate a micro-batch's gradients; `micro_batches` of them make a step.

        Args:
            loss: this micro-batch's contribution to the global batch's mean loss. Gradients are
                those of the sum over ranks and micro-batches.
            last: whether this is the step's last micro-batch.
        """
        # DeepSpeed divides by the number of micro-batches and averages over the ranks.
        self.engine.backward(loss * float(self.micro_batches * self.world_size))
        if not last:
            self.engine.step()

    def step(self, step: int, accept: AcceptStep = accept_finite) -> bool:
        """Optimizer step at this step's learning rate; returns whether it was taken.

        Args:
            accept: called once with the gradient norm before clipping; if it does not take the
                step, weights and moments do not change.
        """
        for group in self.base_optimizer.param_groups:
            group["lr"] = learning_rate(self.train, step)
        self._accept = accept
        if self.train.zero_stage == 0:
            return self._replicated_step()
        self.engine.step()
        return not self.zero.skipped

    def update_ema(self, step: int) -> None:
        """Update the EMA with the current weights; called after every step, taken or not."""
        self.ema.update(step)

    def grad_norm(self) -> float:
        """L2 norm of the last global gradient before clipping."""
        return self._norm

    def optimizer_steps(self) -> int:
        """Adam's step count, used for bias correction."""
        steps = {int(self._adam(part.flat)["step"]) for part in self._owned}
        if len(steps) > 1:
            raise DiffitError(f"Adam's parameter groups disagree on their step: {sorted(steps)}")
        return steps.pop() if steps else 0

    def set_optimizer_steps(self, steps: int) -> None:
        """Set Adam's step count."""
        for part in self._held_slices():
            self._adam(part.flat)["step"].fill_(float(steps))

    def destroy(self) -> None:
        """Undo what DeepSpeed did to the model and to torch, and free its memory."""
        self.engine.destroy()
        # Stage 3 replaces it for the life of the process.
        functional.linear = self._linear

    # ---- State, by slices ----

    def owned(self) -> list[OwnedSlice]:
        """The slices that only this rank owns; all ranks together cover every parameter."""
        out = []
        for number, part in enumerate(self._owned):
            averages = {name: parts[number] for name, parts in self.ema.averages.items()}
            out.append(OwnedSlice(part.slice, self._adam_values(part) | averages))
        return out

    @torch.no_grad()
    def publish_owned(self) -> None:
        """Make the weights that the model computes with from all ranks' masters (collective).

        At stage 0, where every rank holds everything, the moments are also shared.
        """
        if self.train.zero_stage == 0:
            self._broadcast_shares()
        else:
            self.zero.publish()

    def _broadcast_shares(self) -> None:
        """Each rank's share of every replicated tensor, to all ranks."""
        for rank in range(self.world_size):
            for part in self._shares_of_replicas(rank):
                for values in self._adam_values(part).values():
                    dist.broadcast(values, src=rank)

    def _adam_values(self, part: FlatSlice) -> dict[StateName, Tensor]:
        state = self._adam(part.flat)
        flats = {
            "master": part.flat.detach(),
            "exp_avg": state["exp_avg"].view(-1),
            "exp_avg_sq": state["exp_avg_sq"].view(-1),
        }
        return {kind: f.narrow(0, part.start, part.slice.length) for kind, f in flats.items()}

    def _adam(self, flat: Tensor) -> dict[str, Tensor]:
        """Adam's state for a flat tensor; at stage 0, for the parameter it views."""
        owner = self._flat_owner.get(id(flat), flat)
        return cast(dict[str, Tensor], self.base_optimizer.state[owner])

    def _exact_weights(self) -> dict[str, Tensor]:
        """The model's weights before DeepSpeed rounds them to bf16, those of rank 0 (collective).

        DeepSpeed makes the master weights from the rounded ones.
        """
        weights = {name: parameter.detach().view(-1) for parameter, name in self.names.items()}
        for values in weights.values():
            dist.broadcast(values, src=0)
        return weights

    def _start_moments(self) -> None:
        """Create zero moments, as Adam itself does at its first step."""
        for part in self._held_slices():
            master = self._flat_owner.get(id(part.flat), part.flat)
            state = self.base_optimizer.state[master]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)

    def _held_slices(self) -> Iterator[FlatSlice]:
        """Whole parameters at stage 0, otherwise what this rank owns."""
        if self.train.zero_stage:
            yield from self._owned
            return
        for flat, name in self._replicas:
            yield FlatSlice(Slice(name, 0, flat.numel()), flat, 0)

    def _shares_of_replicas(self, rank: int) -> Iterator[FlatSlice]:
        """A rank's part at stage 0: all parameters concatenated and split into one per rank."""
        total = sum(p.numel() for p in self.names)
        first, last = (total * r // self.world_size for r in (rank, rank + 1))
        offset = 0
        for flat, name in self._replicas:
            start, end = max(first, offset), min(last, offset + flat.numel())
            if start < end:
                yield FlatSlice(Slice(name, start - offset, end - start), flat, start - offset)
            offset += flat.numel()

    # ---- Accepting a step ----

    def _checked(self, norm: Tensor) -> Tensor:
        """The norm if the step is accepted, else infinity; on the host, where DeepSpeed checks it.

        `accept` has read the norm from the device, which need not be done again.
        """
        accepted, self._norm = self._accept(norm)
        return torch.tensor(self._norm if accepted else math.inf)

    def _replicated_step(self) -> bool:
        """Stage 0, where DeepSpeed neither checks nor returns the norm."""
        gradients = [p.grad for p in self.names if p.grad is not None]
        good, self._norm = self._accept(torch.nn.utils.get_total_norm(gradients))
        if not good:
            for parameter in self.names:
                parameter.grad = None
        elif self.train.grad_clip is not None:
            factor = self.train.grad_clip / (self._norm + 1e-6)
            if factor < 1.0:
                torch._foreach_mul_(gradients, factor)
        self.engine.step()
        return good


def bucket_elements(train: Train, elements: int) -> int:
    """Gradient elements that are reduced together, for a model of `elements` parameters."""
    # A single bucket would be reduced only after the backward pass.
    return min(BUCKET_ELEMENTS, -(-elements // 10)) if train.overlap_comm else BUCKET_ELEMENTS


def _deepspeed_config(
    train: Train, elements: int, micro_batches: int, device: torch.device
) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "reduce_bucket_size": bucket_elements(train, elements),
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if train.overlap_comm is not None:
        zero["overlap_comm"] = train.overlap_comm
    pin = device.type == "cuda"
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    config: dict[str, Any] = {
        # Only used by DeepSpeed's bookkeeping: ranks may have unequal shares of a batch.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": zero,
        # DeepSpeed's CPU Adam takes minutes to compile on first use.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed clips at 1 by default; at stage 0 we clip, after checking the norm.
        "gradient_clipping": (train.grad_clip or 0.0) if train.zero_stage else 0.0,
        "steps_per_print": 10**9,
        # It would wait for the device twice a step; training has its own meters.
        "timers": {"throughput": {"enabled": False}},
    }
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if train.zero_stage in (2, 3):
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
