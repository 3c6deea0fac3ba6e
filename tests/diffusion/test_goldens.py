"""Losses, gradients and samples of every objective and sampler, as they have always been.

goldens.json was written by `python -m tests.diffusion.test_goldens` before objectives and samplers
got their common interface. Write it again only where a change of values is intended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffit_train.config import Recipe, load_recipe
from diffit_train.config.evaluate import SAMPLERS
from diffit_train.data.loader import Batch
from diffit_train.data.manifest import Manifest
from diffit_train.diffusion.objective import build_objective
from diffit_train.evaluation.generate import Generator
from diffit_train.models.build import build_model
from diffit_train.training.batch import BatchBuilder

GOLDENS = Path(__file__).parent / "goldens.json"
CPU = torch.device("cpu")
FORMER = ("epsilon", "flow")
SAMPLER_OPTIONS = {"ddim": ", eta: 0.5"}
GUIDANCE = {
    "constant": "{kind: constant, scale: 2, channels: 3}",
    "power_cosine": "{kind: power_cosine, scale: 4, channels: 4}",
    "interval": "{kind: interval, scale: 3, low: 0.2, high: 0.6, channels: all}",
}
CASES = [
    *[f"{objective} {architecture}" for objective in FORMER for architecture in ("diffit", "dit")],
    *[
        f"{objective} {name} {kind}"
        for objective in FORMER
        for name in SAMPLERS[objective]
        for kind in GUIDANCE
    ],
]


class _Latents:
    """An autoencoder that leaves latents as they are."""

    device = CPU

    def decode(self, latents: torch.Tensor, how: str) -> torch.Tensor:
        return latents


def _recipe(objective: str, *changes: str) -> Recipe:
    small = ["hidden_size=16", "depth=2", "num_heads=2", "attention=reference"]
    overrides = [f"model.{change}" for change in small]
    return load_recipe("demo", [*overrides, f"diffusion.objective={objective}", *changes])


def _random_weights(model: torch.nn.Module) -> None:
    """Weights without zeros, so that every parameter has an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def _loss(objective_name: str, architecture: str) -> dict[str, Any]:
    sampler = f"evaluate.sampler.name={SAMPLERS[objective_name][0]}"
    recipe = _recipe(objective_name, f"model.architecture={architecture}", sampler)
    objective = build_objective(recipe.diffusion)
    model = build_model(recipe)
    _random_weights(model)
    random = np.random.default_rng(2)
    moments = random.standard_normal((4, 1, 8, 4, 4)).astype(np.float32)
    source = Batch(3, range(2), np.arange(4), ("s",), moments, np.array([0, 3, 5, 9]))
    manifest = Manifest.model_construct(channels=4, height=4, width=4, frames=1, scale=0.5)
    batch = BatchBuilder(recipe, manifest, objective, CPU)(source)
    x0, t, noise, y = batch.tensors()
    output = model(*objective.precondition(objective.noisy(x0, t, noise), t), y)
    losses = objective.loss(output, x0, t, noise)
    losses.mean().backward()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    return {
        "t": t.tolist(),
        "losses": losses.tolist(),
        "gradients": [sum(norms), max(norms), norms[0], norms[-1]],
    }


def _sample(objective: str, name: str, kind: str) -> dict[str, Any]:
    sampler = f"{{name: {name}, steps: 10{SAMPLER_OPTIONS.get(name, '')}}}"
    recipe = _recipe(
        objective, f"evaluate.sampler={sampler}", f"evaluate.guidance={GUIDANCE[kind]}"
    )
    model = build_model(recipe)
    _random_weights(model)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    generator = Generator(recipe, weights, _Latents())  # type: ignore[arg-type]
    x = torch.as_tensor(generator([(0, 0), (0, 1)], [1, 7])).flatten().double()
    return {"norm": float(x.norm()), "values": x[:: len(x) // 6].tolist()}


def measure(case: str) -> dict[str, Any]:
    """The values of a case."""
    objective, *rest = case.split()
    return _loss(objective, rest[0]) if len(rest) == 1 else _sample(objective, rest[0], rest[1])


@pytest.mark.parametrize("case", CASES)
def test_values_are_as_before(case: str) -> None:
    expected = json.loads(GOLDENS.read_text())[case]
    found = measure(case)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=2e-5, abs=1e-6), key


if __name__ == "__main__":
    GOLDENS.write_text(json.dumps({case: measure(case) for case in CASES}, indent=1) + "\n")
