"""Training steps of the 561M model under ZeRO on this machine; its memory against the plan's.

python -m tests.benchmarks.full_step [--world 2 --batch 4 --steps 2 --stage 2]
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import time

import numpy as np
import psutil
import torch
import torch.distributed as dist

from diffit_train import storage
from diffit_train.config.diffusion import Diffusion
from diffit_train.config.train import Train
from diffit_train.diffusion.objective import build_objective
from diffit_train.jobs.plan import state_bytes
from diffit_train.models.backbone import trainable_parameters
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.training.engine import Engine
from tests.benchmarks.common import print_table
from tests.training import ranks


def tensor_bytes() -> int:
    """Bytes of all tensors in this process, counting each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and not item.is_meta:
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def _train(rank: int, world: int, batch: int, steps: int, stage: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    process = psutil.Process()
    resident, before = process.memory_info().rss, tensor_bytes()
    model = LatentDiffiT(Shape())
    count = trainable_parameters(model)
    train = Train(steps=1000, batch_size=batch, lr=3e-4, zero_stage=stage)
    engine = Engine(model, train, rank, world, torch.device("cpu"))
    objective = build_objective(Diffusion())
    rows = []
    for step in range(steps):
        random = np.random.default_rng([step, rank])
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x0, noise = (torch.randn(batch // world, 4, 32, 32, generator=generator) for _ in range(2))
        t = torch.from_numpy(objective.draw(random, batch // world))
        start = time.perf_counter()
        output = engine.forward(objective.noisy(x0, t, noise), t, t)
        loss = objective.loss(output, x0, t, noise).mean()
        engine.backward(loss / world)
        engine.step(step)
        engine.update_ema(step)
        seconds = time.perf_counter() - start
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        value = mean.item() / world
        if not math.isfinite(value):
            raise RuntimeError(f"the loss of step {step} is {value}")
        rows.append([str(step), f"{value:.4f}", f"{engine.grad_norm():.3f}", f"{seconds:.1f}"])
        del output, loss
    held = tensor_bytes() - before
    if rank == 0:
        title = f"561M, {world} ranks, ZeRO {stage}, fp32, {batch} images per step"
        print_table(title, ["step", "loss", "gradient norm", "s"], rows)
        planned = state_bytes(count, stage, world, 1, bf16=False)
        lasting = planned.total - planned.gradients
        grown = process.memory_info().rss - resident
        print_table(
            "GiB per rank between steps (without gradients)",
            ["", "GiB", "to plan"],
            [
                ["planned states", f"{lasting / storage.GIB:.3f}", ""],
                ["tensors held", f"{held / storage.GIB:.3f}", f"{held / lasting:.3f}"],
                ["process growth", f"{grown / storage.GIB:.3f}", f"{grown / lasting:.3f}"],
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2)
    options = parser.parse_args()
    ranks.TIMEOUT_S = 3600
    ranks.on_ranks(options.world, _train, options.batch, options.steps, options.stage)


if __name__ == "__main__":
    main()
