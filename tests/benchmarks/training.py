"""Training cost against a plain loop: a step, the EMA, a checkpoint, bytes of state.

    python -m tests.benchmarks.training step          overhead of a step, and of the EMA
    python -m tests.benchmarks.training checkpoint    how long training is blocked
    python -m tests.benchmarks.training states        bytes per rank by ZeRO stage, against the plan

Each table names its baseline, which is interleaved with it in the same process.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from diffit_train.config.diffusion import Diffusion
from diffit_train.config.train import BUCKET_ELEMENTS, EmaProfile, Train
from diffit_train.diffusion.objective import build_objective
from diffit_train.jobs.plan import state_bytes
from diffit_train.models.backbone import trainable_parameters
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.wrap import use_kernel
from diffit_train.ray_session import KEEP_FREED_MEMORY
from diffit_train.runs.checkpoints import Checkpoint
from diffit_train.training.checkpointer import CheckpointWriter
from diffit_train.training.engine import Engine
from tests.benchmarks.common import interleaved_seconds, print_table
from tests.benchmarks.full_step import tensor_bytes
from tests.made import make_state
from tests.training import ranks

GIB = 2**30
MIB = 2**20
SIZES: dict[str, dict[str, Any]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "XL": {},
}


def _model(size: str) -> LatentDiffiT:
    torch.manual_seed(0)
    return LatentDiffiT(Shape(**SIZES[size]))


def _batch(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, noise = (torch.randn(count, 4, 32, 32, device=device) for _ in range(2))
    t = torch.randint(1000, (count,), device=device)
    return x0, t, noise, torch.randint(1000, (count,), device=device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _step(rank: int, world: int, size: str, count: int, rounds: int, precision: str) -> None:
    """One worker against a plain PyTorch loop over the same model and batch."""
    torch.set_num_threads(torch.get_num_threads() if _device().type == "cuda" else 2)
    device, objective = _device(), build_objective(Diffusion())
    batch = _batch(count, device)
    train = Train(steps=10**6, batch_size=count, ema={}, zero_stage=1, precision=precision)

    plain = _model(size).to(device)
    use_kernel(plain, "auto", device)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, fused=True)

    def loop() -> None:
        x0, t, noise, y = batch
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
            output = plain(objective.noisy(x0, t, noise), t, y).float()
        objective.loss(output, x0, t, noise).mean().backward()
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()

    engines = {}
    for stage in (0, 1, 2):
        if stage == 0 and precision == "bf16":
            continue
        model = _model(size).to(device)
        use_kernel(model, "auto", device)
        changed = train.model_copy(update={"zero_stage": stage})
        engines[stage] = Engine(model, changed, rank, world, device)
    parts = dict.fromkeys(("forward, backward", "optimizer step", "one average"), float("inf"))
    steps = dict.fromkeys(engines, 0)

    def ours(stage: int) -> None:
        engine = engines[stage]
        x0, t, noise, y = batch
        output = engine.forward(objective.noisy(x0, t, noise), t, y)
        engine.backward(objective.loss(output, x0, t, noise).sum() / count)
        engine.step(steps[stage])
        steps[stage] += 1

    bodies = {"plain PyTorch loop": loop}
    bodies |= {f"ZeRO {stage}": (lambda stage=stage: ours(stage)) for stage in engines}
    seconds = interleaved_seconds(bodies, device, rounds)
    base = seconds["plain PyTorch loop"]
    print_table(
        f"A step of {size}, {trainable_parameters(plain):,} parameters, {count} images, one "
        f"worker, {precision}, {device.type}; best of {rounds}",
        ["", "s", "to plain"],
        [[name, f"{s:.4f}", f"{s / base:.3f}"] for name, s in seconds.items()],
    )
    engines.clear()
    gc.collect()

    averaged = train.model_copy(update={"ema": {"ema": EmaProfile(decay=0.9999)}, "zero_stage": 2})
    model = _model(size).to(device)
    use_kernel(model, "auto", device)
    engine = Engine(model, averaged, rank, world, device)
    x0, t, noise, y = batch
    for number in range(rounds + 1):
        marks = [time.perf_counter()]

        def mark(marks: list[float] = marks) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

        output = engine.forward(objective.noisy(x0, t, noise), t, y)
        engine.backward(objective.loss(output, x0, t, noise).sum() / count)
        mark()
        engine.step(number)
        mark()
        engine.update_ema(number)
        mark()
        for name, before, after in zip(parts, marks, marks[1:], strict=False):
            parts[name] = min(parts[name], after - before)
    whole = sum(parts.values())
    print_table(
        f"Parts of a step of {size}, ZeRO 2, one worker; best of {rounds}",
        ["", "s", "vs. optimizer step", "vs. whole step"],
        [
            [name, f"{s:.4f}", f"{s / parts['optimizer step']:.3f}", f"{s / whole:.3f}"]
            for name, s in parts.items()
        ],
    )


def _checkpoint(rank: int, world: int, size: str) -> None:
    """How long `save` blocks training, and how long the rest takes in the background."""
    train = Train(steps=10**6, batch_size=world, zero_stage=2)
    engine = Engine(_model(size), train, rank, world, torch.device("cpu"))
    writer = CheckpointWriter(engine)
    state = make_state(1, world_size=world, zero_stage=2)
    folder: list[Any] = [tempfile.mkdtemp(prefix="diffit-bench-") if rank == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    rows = []
    for number in range(1, 4):
        state = state.model_copy(update={"step": number})
        started_s = time.perf_counter()
        writer.save(Checkpoint(folder[0], number), state)
        blocked_s = time.perf_counter() - started_s
        writer.wait()
        whole_s = time.perf_counter() - started_s
        size_bytes = sum(16 * s.slice.length for s in engine.owned())
        rows.append(
            [str(number), f"{size_bytes / GIB:.2f}", f"{blocked_s:.2f}", f"{whole_s:.2f}",
             f"{blocked_s / whole_s:.2f}"]
        )  # fmt: skip
        if rank == 0:
            import shutil

            shutil.rmtree(f"{folder[0]}/checkpoints")
        torch.distributed.barrier()
    if rank == 0:
        print_table(
            f"A checkpoint of {size}, {world} ranks, to a local disk; baseline: waiting until it "
            "is committed",
            ["", "GiB per rank", "training waits, s", "committed after, s", "fraction"],
            rows,
        )


def _states(rank: int, world: int, size: str) -> None:
    """Bytes of tensors that persist between steps, against `diffit plan`."""
    rows, objective = [], build_objective(Diffusion())
    for stage in range(4):
        gc.collect()
        before = tensor_bytes()
        model = _model(size)
        count = trainable_parameters(model)
        train = Train(steps=9, batch_size=world, zero_stage=stage)
        engine = Engine(model, train, rank, world, torch.device("cpu"))
        for step in range(2):
            x0, t, noise, y = _batch(1, torch.device("cpu"))
            output = engine.forward(objective.noisy(x0, t, noise), t, y)
            engine.backward(objective.loss(output, x0, t, noise).sum() / world)
            engine.step(step)
            engine.update_ema(step)
        del output, x0, noise, t, y
        gc.collect()
        held = tensor_bytes() - before
        planned = state_bytes(count, stage, world, 1, bf16=False)
        lasting = planned.total - planned.gradients
        if stage == 3:  # which keeps its buffers from step to step
            lasting = planned.total + 4 * BUCKET_ELEMENTS
        rows.append(
            [str(stage), f"{held / MIB:,.0f}", f"{lasting / MIB:,.0f}", f"{held / lasting:.3f}"]
        )
        engine.destroy()
        del engine, model
    if rank == 0:
        print_table(
            f"MiB per rank between steps, {size}, {world} ranks, fp32, one EMA; baseline: "
            "diffit plan without gradients and buckets, which stages 0 to 2 free",
            ["ZeRO stage", "held", "planned", "held vs. planned"],
            rows,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("step", "checkpoint", "states"))
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16", "bf16_autocast"), default="fp32")
    options = parser.parse_args()
    ranks.TIMEOUT_S = 3600
    # As in training workers; also applies to the plain loop.
    os.environ.update(KEEP_FREED_MEMORY)
    if options.what == "step":
        arguments = (options.size, options.batch, options.rounds, options.precision)
        ranks.on_ranks(1, _step, *arguments)
    elif options.what == "checkpoint":
        ranks.on_ranks(options.world, _checkpoint, options.size)
    else:
        for world in (1, 2, 4):
            ranks.on_ranks(world, _states, options.size)


if __name__ == "__main__":
    main()
