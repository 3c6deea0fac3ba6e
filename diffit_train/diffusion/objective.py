"""Training objectives, and how to sample from models trained with them.

Each objective has its own noise levels t: for ADM's diffusion integers in [0, T); for the flow real
numbers in [0, T), with flow time t / T; for EDM sigma. Common to all is `level(t)` in [0, 1].

Shapes: x (B, C, h, w); t (B,); model output (B, O, h, w).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffit_train.config.diffusion import (
    OBJECTIVES,
    CustomObjective,
    Diffusion,
    PackagedDiffusion,
)
from diffit_train.config.evaluate import Sampler
from diffit_train.config.plugins import require
from diffit_train.config.recipe import Recipe
from diffit_train.diffusion.edm import build_edm
from diffit_train.diffusion.flow import flow_loss, interpolate
from diffit_train.diffusion.gaussian import add_noise, predict_x0, training_loss
from diffit_train.diffusion.guidance import Denoiser, build_weight, repeated, skipped_fraction
from diffit_train.diffusion.samplers import (
    Noise,
    SamplerFunction,
    ddim,
    ddpm,
    dpmpp_2m,
    flow_euler,
    flow_heun,
    flow_sde,
    heun,
)
from diffit_train.diffusion.schedule import (
    Schedule,
    ddim_spaced,
    evenly_spaced,
    linear_schedule,
    respace,
)

# w(t) = this * sigma(t) in the flow's SDE.
SDE_DIFFUSION = {"2sigma": 2.0, "sigma": 1.0}


# A noise level on the host, or one of each image.
Level = TypeVar("Level", float, Tensor)


class Objective(Protocol):
    """Interface of an objective to training and sampling.

    One of another package is made as `Objective(**options)`, with the recipe's
    `diffusion.options`. The network predicts C channels.
    """

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Noise levels t of training images, (count,)."""

    def level(self, t: Level) -> Level:
        """t in [0, 1]: the fraction of training images that are less noisy. For logs, guidance."""

    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Corrupt x_0."""

    def precondition(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The model's inputs, fp32 (B, C, h, w) and (B,), for x at noise levels t."""

    def loss(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss per image, (B,)."""

    def sample(self, sampler: Sampler, denoise: Denoiser, x: Tensor, noise: Noise) -> Tensor:
        """x_0 from standard normal x; `denoise(x, t)` is the model's output at noise level t."""

    def predicted_x0(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """x_0 as the model's output at (x, t) predicts it, fp32; t as `sample` gives it."""


@dataclass(frozen=True)
class EpsilonObjective:
    """ADM: noise prediction with learned-range variance."""

    schedule: Schedule
    _schedules: dict[tuple[str, int], Schedule] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Uniform integers (count,)."""
        return random.integers(len(self.schedule), size=count)

    def level(self, t: Level) -> Level:
        """t / T."""
        return t / len(self.schedule)

    def precondition(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Unchanged."""
        return x, t

    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `gaussian.add_noise`."""
        return add_noise(self.schedule, x0, t, noise)

    def loss(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `gaussian.training_loss`."""
        return training_loss(self.schedule, output, x0, t, noise).total

    def sample(self, sampler: Sampler, denoise: Denoiser, x: Tensor, noise: Noise) -> Tensor:
        """Run the recipe's sampler on the respaced schedule."""
        run: dict[str, SamplerFunction[Schedule]] = {
            "ddpm": ddpm,
            "dpmpp_2m": dpmpp_2m,
            "heun": heun,
        }
        if sampler.name == "ddim":
            run["ddim"] = functools.partial(ddim, eta=sampler.eta)
        return run[sampler.name](self._respaced(sampler), denoise, x, noise)

    def predicted_x0(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """From the predicted noise, as `gaussian.predict_x0`."""
        noise, _ = output.chunk(2, dim=1)
        return predict_x0(self.schedule, x, repeated(int(t), x), noise)

    def _respaced(self, sampler: Sampler) -> Schedule:
        """The sampler's schedule; kept, as its tables are copied to the device once."""
        spacing = sampler.spacing if sampler.name == "ddim" else "even"
        how = (spacing, sampler.steps)
        if how not in self._schedules:
            space = ddim_spaced if spacing == "ddim" else evenly_spaced
            kept = space(len(self.schedule), sampler.steps)
            self._schedules[how] = respace(self.schedule, kept)
        return self._schedules[how]


@dataclass(frozen=True)
class FlowObjective:
    """Flow matching: velocity prediction on the linear path."""

    timesteps: int

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Uniform real numbers (count,), float32."""
        return random.random(count, dtype=np.float32) * np.float32(self.timesteps)

    def level(self, t: Level) -> Level:
        """t / T."""
        return t / self.timesteps

    def precondition(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Unchanged."""
        return x, t

    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `flow.interpolate`."""
        return interpolate(x0, t / self.timesteps, noise)

    def loss(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `flow.flow_loss`."""
        return flow_loss(output, x0, noise)

    def sample(self, sampler: Sampler, denoise: Denoiser, x: Tensor, noise: Noise) -> Tensor:
        """Run the recipe's sampler."""

        def velocity(x: Tensor, t: float) -> Tensor:
            return denoise(x, t * self.timesteps)

        if sampler.name == "sde":
            times = [*np.linspace(1.0, sampler.last_step_size, sampler.steps).tolist(), 0.0]
            scale = SDE_DIFFUSION[sampler.diffusion]
            return flow_sde(times, velocity, x, noise, scale, sampler.last_step)
        run: dict[str, SamplerFunction[Sequence[float]]] = {"euler": flow_euler, "heun": flow_heun}
        times = np.linspace(1.0, 0.0, sampler.steps + 1).tolist()
        return run[sampler.name](times, velocity, x, noise)

    def predicted_x0(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """x - u v, as x_u = (1 - u) x_0 + u noise and v = noise - x_0."""
        return x - (t / self.timesteps) * output


METHODS = ("draw", "level", "noisy", "precondition", "loss", "sample", "predicted_x0")


def load_objective(diffusion: Diffusion) -> Objective:
    """The recipe's objective, one of ours or of another package.

    Raises:
        UserError: it cannot be made, or lacks methods.
    """
    if not isinstance(diffusion, CustomObjective):
        return build_objective(diffusion)
    made: Objective = OBJECTIVES.make(diffusion.objective, diffusion.options)
    require(OBJECTIVES.key, diffusion.objective, made, METHODS)
    return made


def build_objective(diffusion: PackagedDiffusion) -> Objective:
    """The recipe's objective, one of ours."""
    if diffusion.objective == "epsilon":
        return EpsilonObjective(
            linear_schedule(diffusion.timesteps, diffusion.beta_start, diffusion.beta_end)
        )
    if diffusion.objective == "flow":
        return FlowObjective(diffusion.timesteps)
    return build_edm(diffusion)


def sampler_sigmas(diffusion: Diffusion, sampler: Sampler) -> list[float]:
    """Levels in [0, 1] at which a sampler calls its denoiser, in order; used to count the NFE."""
    objective, visited = load_objective(diffusion), []

    def denoise(x: Tensor, t: float) -> Tensor:
        visited.append(objective.level(float(t)))
        return torch.zeros(1, 2 if diffusion.learned_variance else 1, 1, 1)

    x = torch.zeros(1, 1, 1, 1)
    objective.sample(sampler, denoise, x, lambda _: x)
    return visited


def nfe_per_image(recipe: Recipe) -> float:
    """NFE per image, including those for guidance."""
    guidance = recipe.evaluate.guidance
    visited = sampler_sigmas(recipe.diffusion, recipe.evaluate.sampler)
    if not recipe.model.conditional or guidance.kind == "none":
        return float(len(visited))
    share = skipped_fraction(build_weight(guidance), visited, guidance.skip_within)
    return 2.0 * len(visited) * (1.0 - share)
