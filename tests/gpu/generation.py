"""Generating and measuring the images of an evaluation, by precision and compilation."""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from diffit_train.config import Recipe
from diffit_train.data.autoencoder import LoadedAutoencoder
from diffit_train.diffusion.objective import nfe_per_image
from diffit_train.evaluation.generate import Generator
from diffit_train.evaluation.inception import Inception
from diffit_train.models.build import build_model
from diffit_train.models.cost import training_flops_per_image
from tests.benchmarks.common import interleaved_seconds, peak_bytes, synchronize
from tests.gpu.autoencoder import WAYS, loaded, stable_diffusion_autoencoder
from tests.gpu.kit import GIB, Machine, Report

# Sampler steps that are timed; those of the recipe take as long each.
STEPS = 20
FID_IMAGES = 50_000


def run(report: Report) -> None:
    """The recipe at 256 tokens; then the one at 1,024 in its own precision."""
    machine = report.machine
    torch.manual_seed(0)
    way = WAYS[machine.recipe(256).autoencoder.precision]
    autoencoder = loaded(stable_diffusion_autoencoder(machine), way, machine.device)
    measuring_s: dict[int, float] = {}
    ways = itertools.product((False, True), ("bf16_autocast", "tf32", "fp32"))
    cases = [(256, precision, compiled) for compiled, precision in ways]
    cases += [(1024, "bf16_autocast", False), (1024, "bf16_autocast", True)]
    for tokens in (256, 1024):
        report.attempt(
            f"measuring, {tokens} tokens",
            functools.partial(_measuring, report, autoencoder, tokens, measuring_s),
        )
    for tokens, precision, compiled in cases:
        if compiled and not machine.cuda:  # takes a minute, and its times are of no interest
            continue
        name = f"{precision}{', compiled' if compiled else ''}"
        body = functools.partial(
            _generating, report, autoencoder, tokens, name, precision, compiled, measuring_s
        )
        report.attempt(f"{name}, {tokens} tokens", body, needs_s=60 if compiled else 30)


def _recipe(machine: Machine, tokens: int, *changes: str) -> Recipe:
    if not machine.tiny:
        return machine.recipe(tokens, *changes)
    # The autoencoder of Stable Diffusion's structure has eight pixels to a latent.
    side = {256: 64, 1024: 128}[tokens]
    sizes = [f"data.resolution={side}", "autoencoder.downsample=8", "evaluate.batch_size=2"]
    return machine.recipe(tokens, *sizes, *changes)


def _batch_size(machine: Machine, tokens: int) -> int:
    return 2 if machine.tiny else {256: 32, 1024: 8}[tokens]


def _measuring(
    report: Report, autoencoder: LoadedAutoencoder, tokens: int, measuring_s: dict[int, float]
) -> None:
    """Decoding and Inception, which are the same whatever the precision of the model."""
    machine = report.machine
    recipe, count = _recipe(machine, tokens), _batch_size(machine, tokens)
    side = recipe.latent_size
    latents = torch.randn(count, 4, side, side, device=machine.device)
    network = Inception().eval().requires_grad_(False).to(machine.device)
    pixels = torch.from_numpy(autoencoder.decode(latents)).to(machine.device)

    def measure() -> None:
        with torch.no_grad():
            network(pixels).pool.cpu()

    bodies = {
        "decoding, as the recipe": lambda: autoencoder.decode(latents),
        "Inception, fp32": measure,
    }
    found = interleaved_seconds(bodies, machine.device, 3 if machine.cuda else 1)
    for name, seconds in found.items():
        report.add(
            f"after sampling, {recipe.data.resolution}x{recipe.data.resolution}, {count} images",
            what=name,
            images_per_s=count / seconds,
            peak_gib=peak_bytes(bodies[name], machine.device) / GIB,
        )
    measuring_s[tokens] = sum(found.values()) / count


def _generating(
    report: Report,
    autoencoder: LoadedAutoencoder,
    tokens: int,
    name: str,
    precision: str,
    compiled: bool,
    measuring_s: dict[int, float],
) -> None:
    """Network evaluations per second, and what they make of FID-50K on this GPU."""
    machine = report.machine
    changes = [f"evaluate.precision={precision}", f"evaluate.compile={str(compiled).lower()}"]
    whole = _recipe(machine, tokens, *changes)
    timed = _recipe(machine, tokens, *changes, f"evaluate.sampler.steps={_steps(machine)}")
    with machine.device:
        model = build_model(whole).to(machine.device)
    flops = training_flops_per_image(model) / 3
    # Without an autoencoder, only sampling is timed.
    sampler = Generator(timed, _weights(model), replace(autoencoder, model=None))
    del model
    count = _batch_size(machine, tokens)
    keys = [(0, index) for index in range(count)]
    labels = np.arange(count) % timed.data.num_classes

    def generate() -> None:
        sampler(keys, labels.tolist())

    started_s = time.perf_counter()
    generate()
    synchronize(machine.device)
    first_s = time.perf_counter() - started_s
    (seconds,) = interleaved_seconds({name: generate}, machine.device, 1).values()
    evaluation_s = seconds / count / nfe_per_image(timed)
    image_s = evaluation_s * nfe_per_image(whole) + measuring_s.get(tokens, float("nan"))
    report.add(
        f"generation, {whole.data.resolution}x{whole.data.resolution}, {count} images, "
        f"{whole.evaluate.sampler.steps} steps, computed from {_steps(machine)}",
        what=name,
        nfe_per_s=1 / evaluation_s,
        tflops=flops / evaluation_s / 1e12,
        images_per_s=1 / image_s,
        fid_50k_hours=FID_IMAGES * image_s / 3600,
        first_batch_s=first_s,
    )


def _steps(machine: Machine) -> int:
    return 4 if machine.tiny else STEPS


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
