"""Training steps as a recipe makes them: MFU, kernels, memory."""

from __future__ import annotations

import functools
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from diffit_train.config import Recipe
from diffit_train.diffusion.objective import build_objective
from diffit_train.jobs.plan import Machine as PlannedMachine
from diffit_train.jobs.plan import plan
from diffit_train.models.build import build_model
from diffit_train.models.cost import training_flops_per_image
from diffit_train.models.wrap import checkpoint_activations, compile_blocks, use_kernel
from diffit_train.training.engine import Engine
from tests.benchmarks.common import matrix_rate, peak_bytes, synchronize
from tests.benchmarks.full_step import tensor_bytes
from tests.gpu.kit import GIB, Machine, Report, data_sheet, start_ranks

STEPS, WARMUP = 10, 3
# Steps of a profile, and rows of its table.
PROFILED, KERNELS = 3, 15


def run(report: Report) -> None:
    """Steps of the packaged recipes at both sizes."""
    machine = report.machine
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(Path(folder), machine.device)
        rate = matrix_rate(machine.device, torch.bfloat16, rounds=2)
        for tokens in (256, 1024):
            for name, changes in variants(machine, tokens).items():
                body = functools.partial(steps, report, tokens, name, changes, rate)
                report.attempt(f"steps, {tokens} tokens, {name}", body, needs_s=50)


def variants(machine: Machine, tokens: int) -> dict[str, list[str]]:
    """Changes to the recipe, by name; each names all keys that another one changes."""
    batch = machine.batch(tokens)
    size = [f"train.batch_size={batch}", f"data.shuffle_streams={batch}"]
    bf16 = ["train.zero_stage=2", "train.precision=bf16"]
    found = {
        "bf16": bf16,
        "bf16, selective": [*bf16, "train.activation_checkpointing=selective"],
    }
    if machine.cuda:  # compiling on a CPU takes a minute, and its times are of no interest
        found["bf16, compiled"] = [*bf16, "train.compile=true"]
        found["bf16_autocast, compiled"] = [
            "train.zero_stage=2", "train.precision=bf16_autocast", "train.compile=true",
        ]  # fmt: skip
    return {name: [*size, *changes] for name, changes in found.items()}


class Steps:
    """The engine of a recipe on one device, as a training worker sets it up."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.device, self.step = device, 0
        torch.manual_seed(0)
        with device:  # where 561 million random numbers take no time
            model = build_model(recipe).to(device)
        self.flops_per_image = training_flops_per_image(model)
        train = recipe.train
        use_kernel(model, recipe.model.attention, device)
        checkpoint_activations(
            model, train.activation_checkpointing, train.activation_checkpoint_every
        )
        if train.compile:
            compile_blocks(model)
        self.engine = Engine(model, train, 0, 1, device)
        self.objective = build_objective(recipe.diffusion)

    def take(self, tensors: Sequence[Tensor]) -> None:
        """A step with (x0, t, noise, y).

        Raises:
            ValueError: the step was not taken, as its gradients were not finite.
        """
        x0, t, noise, y = (part.to(self.device, non_blocking=True) for part in tensors)
        output = self.engine.forward(self.objective.noisy(x0, t, noise), t, y)
        loss = self.objective.loss(output, x0, t, noise)
        self.engine.backward(loss.sum() / len(t))
        if not self.engine.step(self.step):
            raise ValueError(f"step {self.step} was not taken")
        self.engine.update_ema(self.step)
        self.step += 1


def fixed_batch(recipe: Recipe) -> tuple[Tensor, ...]:
    """(x0, t, noise, y) of a step, on the host."""
    generator, count = torch.Generator().manual_seed(0), recipe.train.batch_size
    shape = (count, recipe.autoencoder.latent_channels, recipe.latent_size, recipe.latent_size)
    x0, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.randint(recipe.diffusion.timesteps, (count,), generator=generator)
    return x0, t, noise, torch.randint(recipe.data.num_classes, (count,), generator=generator)


# ---- Steps ----


def steps(report: Report, tokens: int, name: str, changes: list[str], rate: float) -> None:
    """Time and memory of steps on a fixed batch; the plain recipe's are also profiled."""
    machine = report.machine
    device, recipe = machine.device, machine.recipe(tokens, *changes)
    batch = recipe.train.batch_size
    before = held_bytes(device)
    steps = Steps(recipe, device)
    tensors = [part.to(device) for part in fixed_batch(recipe)]
    count = STEPS if machine.cuda else 2

    def many() -> None:
        for _ in range(count):
            steps.take(tensors)

    for _ in range(WARMUP if machine.cuda else 1):
        steps.take(tensors)
    peak = held_bytes(device) + peak_bytes(lambda: steps.take(tensors), device) - before
    synchronize(device)
    started_s = time.perf_counter()
    many()
    synchronize(device)
    seconds = (time.perf_counter() - started_s) / count
    flops = steps.flops_per_image * batch / seconds
    sheet = data_sheet(torch.cuda.get_device_name(device), machine.memory) if machine.cuda else None
    planned = planned_bytes(recipe)
    report.add(
        f"engine steps, {token_count(recipe):,} tokens, {batch} images",
        what=name,
        ms=1e3 * seconds,
        images_per_s=batch / seconds,
        mfu=None if sheet is None else flops / (1e12 * sheet[1].tflops_bf16),
        of_matrix_rate=flops / rate,
        peak_gib=peak / GIB,
        planned_gib=planned / GIB,
        to_plan=peak / planned,
    )
    if name == "bf16":
        _profile(report, token_count(recipe), lambda: steps.take(tensors))
    steps.engine.destroy()


def token_count(recipe: Recipe) -> int:
    """Tokens of an image."""
    return (recipe.latent_size // recipe.model.patch_size) ** 2


def held_bytes(device: torch.device) -> int:
    """Bytes of live tensors."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else tensor_bytes()


def planned_bytes(recipe: Recipe) -> int:
    """What `diffit plan` counts for a GPU."""
    memory = plan(recipe, PlannedMachine("H100"), measured=False)["memory"]
    return int(memory["zero_stage"][str(recipe.train.zero_stage)]["total"])


def _profile(report: Report, tokens: int, take: Callable[[], None]) -> None:
    """The kernels that take the most time, and the share of time in which none runs."""
    cuda, device = report.machine.cuda, report.machine.device
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as profile:
        synchronize(device)
        started_s = time.perf_counter()
        for _ in range(PROFILED):
            take()
        synchronize(device)
        wall_s = time.perf_counter() - started_s
    for row in top_kernels(profile.key_averages(), PROFILED, 1e3 * wall_s / PROFILED, cuda):
        report.add(f"profile of a step, {tokens:,} tokens, bf16", **row)


def top_kernels(averages: Any, steps: int, step_ms: float, cuda: bool) -> list[dict[str, Any]]:
    """Rows of the kernels that take the most time, of the others together, and of none.

    Args:
        averages: of a profile over `steps` steps, by name.
        step_ms: wall time of a profiled step.
        cuda: whether to count a GPU's kernels, or else the CPU's operations.
    """
    found = []
    for event in averages:
        if cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        found.append((micros / 1e3 / steps, event.key, event.count / steps))
    found.sort(key=lambda row: row[0], reverse=True)
    rows = [(key, calls, ms) for ms, key, calls in found[:KERNELS]]
    rest = found[KERNELS:]
    rows.append(("the others", sum(r[2] for r in rest), sum(r[0] for r in rest)))
    busy = sum(ms for _, _, ms in rows)
    rows.append(("no kernel", 0.0, max(0.0, step_ms - busy)))
    return [
        {"what": _short(key), "calls": calls, "ms": ms, "of_step": ms / step_ms}
        for key, calls, ms in rows
    ]


def _short(name: str, length: int = 80) -> str:
    """A kernel's name, cut to a length."""
    name = name.removeprefix("void ").removeprefix("at::native::")
    return name if len(name) <= length else f"{name[: length - 1]}…"
