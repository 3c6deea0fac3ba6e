"""The whole Trainer on a device: `python -m tests.rehearsal.training DEVICE WORLD ROOT CASE…`

DEVICE is cpu, or cuda for the stand-in. Each case trains to a step, then resumes and trains on, as
a run of its own under ROOT. The last line of output is JSON: by case, the losses of all steps and
the counters of a step in the middle.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from diffit_train.runs.run import Run
from tests.rehearsal import stand_in

FIRST, LAST, COUNTED = 6, 9, 4
LATENT = [
    "data.num_classes=3",
    "model.hidden_size=32",
    "model.depth=2",
    "model.num_heads=2",
]
PIXELS = [
    "data.resolution=16",
    "model.channels=[32,32]",
    "model.blocks=[1,1]",
    "model.head_size=8",
    "model.time_size=32",
]
SMALL = [
    "data.images_per_shard=5",
    "data.shuffle_streams=4",
    "data.shuffle_window=4",
    "train.batch_size=8",
    "train.warmup_steps=2",
    "train.log_every=1",
    "train.validate_every=null",
    "train.checkpoint_every=3",
    "train.keep_every=3",
    f"train.steps={LAST}",
]


def train(stage: int, precision: str, *changes: str) -> list[str]:
    """Changes to the recipe `demo`."""
    section = [f"zero_stage={stage}", f"precision={precision}"]
    return ["demo", *LATENT, *SMALL, *(f"train.{each}" for each in (*section, *changes))]


def pixels(stage: int, *changes: str) -> list[str]:
    """Changes to the recipe `cifar10`, with augmentation, dropout and autocast."""
    return ["cifar10", *PIXELS, *SMALL, f"train.zero_stage={stage}", *changes]


# Recipe and changes. Every case of a name's first word has the losses of that word's fp32 case.
CASES = {
    "latent fp32": train(2, "fp32"),
    "latent stage 0, autocast": train(0, "bf16_autocast", "grad_clip=1.0"),
    "latent stage 1, tf32": train(1, "tf32"),
    "latent stage 1, autocast": train(1, "bf16_autocast"),
    "latent stage 1, bf16": train(1, "bf16"),
    "latent stage 2, bf16": train(2, "bf16"),
    "latent stage 2, bf16, micro-batches": train(2, "bf16", "micro_batch_size=3"),
    "latent stage 2, bf16, overlap": train(2, "bf16", "overlap_comm=true"),
    "latent stage 2, autocast": train(2, "bf16_autocast"),
    "latent stage 2, bf16, selective": train(2, "bf16", "activation_checkpointing=selective"),
    "latent stage 2, bf16, compiled": train(2, "bf16", "compile=true"),
    "latent stage 2, bf16, deterministic": train(2, "bf16", "deterministic=true"),
    "latent stage 1, fp32, offload": train(1, "fp32", "offload=optimizer", "grad_clip=0.5"),
    "latent stage 2, bf16, offload": train(2, "bf16", "offload=optimizer"),
    "latent stage 3, bf16, offload": train(3, "bf16", "offload=parameters"),
    "latent stage 3, bf16": train(3, "bf16", "micro_batch_size=2"),
    "latent stage 3, autocast": train(3, "bf16_autocast"),
    "flow fp32": [*train(2, "fp32"), "diffusion.objective=flow", "evaluate.sampler.name=heun"],
    "flow bf16": [*train(2, "bf16"), "diffusion.objective=flow", "evaluate.sampler.name=heun"],
    "pixels fp32": pixels(1, "train.precision=fp32"),
    "pixels stage 0": pixels(0),
    "pixels stage 2": pixels(2),
    "pixels stage 3": pixels(3),
}
RANKS = {
    "latent fp32": CASES["latent fp32"],
    "latent stage 2, bf16, micro-batches": CASES["latent stage 2, bf16, micro-batches"],
    "latent stage 2, bf16, overlap": CASES["latent stage 2, bf16, overlap"],
    "latent stage 2, autocast": CASES["latent stage 2, autocast"],
    "latent stage 3, bf16": CASES["latent stage 3, bf16"],
}


class _Curves:
    """MLflow is not part of this."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def put(self, *_: Any) -> None:
        pass

    def close(self) -> bool:
        return True


def run(device_type: str, rank: int, world: int, root: Path, names: list[str]) -> dict[str, Any]:
    """Train each case; the results of rank 0."""
    if device_type == "cuda":
        stand_in.install()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world)
    return {name: _train(device, rank, world, root, name) for name in names}


def _train(device: Any, rank: int, world: int, root: Path, name: str) -> dict[str, Any]:
    from torch.nn import functional

    from diffit_train.config import load_recipe
    from diffit_train.runs.lease import Lease
    from diffit_train.training import recorder, trainer
    from tests.gpu.loader import write_latents

    linear = functional.linear
    packaged, *changes = CASES[name]
    gpus = int(device.type == "cuda")
    changes += [f"scaling.workers={world}", f"scaling.gpus_per_worker={gpus}"]
    recipe = load_recipe(packaged, changes, root=str(root))
    # Ranks write the same bytes, each for itself.
    manifest = write_latents(recipe, root / f"latents-{packaged}-{rank}", shards=4)
    trainer.latents_url = lambda _: str(root / f"latents-{packaged}-{rank}")  # type: ignore
    trainer.load_manifest = lambda _: manifest  # type: ignore[assignment]
    trainer.matmul_flops_per_s = lambda *_: 1e12  # type: ignore[assignment]
    recorder.Curves = _Curves  # type: ignore[assignment, misc]
    step, counted = trainer.Trainer._train_step, {}

    def counting(self: Any, batch: Any) -> Any:
        if device.type == "cuda" and self.step == COUNTED:
            stand_in.reset_counters()
        decision = step(self, batch)
        if device.type == "cuda" and self.step == COUNTED:
            counted.update(stand_in.counters())
        return decision

    trainer.Trainer._train_step = counting  # type: ignore[method-assign]
    reached = []
    try:
        for steps in (FIRST, LAST):
            shorter = recipe.train.model_copy(update={"steps": steps})
            part = recipe.model_copy(update={"train": shorter})
            each = Run(recipe.storage.root, name, part)
            with trainer.Trainer(each, Lease(each.url, 1, ""), "none", device) as training:
                reached += [number.step for number in training][-1:]
                training.finish()
    except Exception as error:
        if world > 1:  # the other ranks would wait for this one
            raise
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        trainer.Trainer._train_step = step  # type: ignore[method-assign]
    log = Path(Run(recipe.storage.root, name).url) / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "reached": reached,
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "counters": counted,
        "linear_restored": functional.linear is linear,
    }


def main() -> None:
    """Start the other ranks, train as rank 0 and print what came of it."""
    import multiprocessing

    device, world, root, *names = sys.argv[1:]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=run, args=(device, rank, int(world), Path(root), names), daemon=True)
        for rank in range(1, int(world))
    ]
    for process in others:
        process.start()
    results = run(device, 0, int(world), Path(root), names)
    print(json.dumps(results), flush=True)
    # Without waiting for the threads of gloo and DeepSpeed.
    os._exit(0)


if __name__ == "__main__":
    main()
