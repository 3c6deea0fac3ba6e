"""Training objectives, and how to sample from models trained with them.

The model's timesteps t are in [0, T): integers for ADM's diffusion, real numbers for the flow,
with flow time t / T.

Shapes: x (B, C, h, w); t (B,); model output (B, O, h, w).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffit_train.config.diffusion import Diffusion
from diffit_train.config.evaluate import Sampler
from diffit_train.diffusion import flow, gaussian, samplers
from diffit_train.diffusion.guidance import Denoiser
from diffit_train.diffusion.schedule import (
    Schedule,
    ddim_spaced,
    evenly_spaced,
    linear_schedule,
    respace,
)

# w(t) = this * sigma(t) in the flow's SDE.
SDE_DIFFUSION = {"2sigma": 2.0, "sigma": 1.0}


class Objective(Protocol):
    """Interface of an objective to training and sampling."""

    @property
    def timesteps(self) -> int:
        """T."""

    def draw_timesteps(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Uniform timesteps (count,)."""

    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The noisy latents passed to the model."""

    def loss(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss per image, (B,)."""

    def sample(
        self, sampler: Sampler, denoise: Denoiser, x: Tensor, noise: samplers.Noise
    ) -> Tensor:
        """x_0 from standard normal x; `denoise` takes the model's timestep."""


@dataclass(frozen=True)
class EpsilonObjective:
    """ADM: noise prediction with learned-range variance."""

    schedule: Schedule
    _schedules: dict[tuple[str, int], Schedule] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.schedule)

    def draw_timesteps(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Integers (count,)."""
        return random.integers(self.timesteps, size=count)

    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `gaussian.add_noise`."""
        return gaussian.add_noise(self.schedule, x0, t, noise)

    def loss(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `gaussian.training_loss`."""
        return gaussian.training_loss(self.schedule, output, x0, t, noise).total

    def sample(
        self, sampler: Sampler, denoise: Denoiser, x: Tensor, noise: samplers.Noise
    ) -> Tensor:
        """Run the recipe's sampler on the respaced schedule."""
        run: dict[str, samplers.DiffusionSampler] = {
            "ddpm": samplers.ddpm,
            "ddim": functools.partial(samplers.ddim, eta=sampler.eta),
            "dpmpp_2m": samplers.dpmpp_2m,
            "heun": samplers.heun,
        }
        return run[sampler.name](self._respaced(sampler), denoise, x, noise)

    def _respaced(self, sampler: Sampler) -> Schedule:
        """The sampler's schedule; kept, as its tables are copied to the device once."""
        how = (sampler.spacing, sampler.steps)
        if how not in self._schedules:
            space = ddim_spaced if sampler.spacing == "ddim" else evenly_spaced
            kept = space(self.timesteps, sampler.steps)
            self._schedules[how] = respace(self.schedule, kept)
        return self._schedules[how]


@dataclass(frozen=True)
class FlowObjective:
    """Flow matching: velocity prediction on the linear path."""

    timesteps: int

    def draw_timesteps(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Real numbers (count,), float32."""
        return random.random(count, dtype=np.float32) * np.float32(self.timesteps)

    def noisy(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `flow.interpolate`."""
        return flow.interpolate(x0, t / self.timesteps, noise)

    def loss(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As `flow.flow_loss`."""
        return flow.flow_loss(output, x0, noise)

    def sample(
        self, sampler: Sampler, denoise: Denoiser, x: Tensor, noise: samplers.Noise
    ) -> Tensor:
        """Run the recipe's sampler."""

        def velocity(x: Tensor, t: float) -> Tensor:
            return denoise(x, t * self.timesteps)

        run: dict[str, samplers.FlowSampler] = {
            "euler": samplers.flow_euler,
            "heun": samplers.flow_heun,
            "sde": functools.partial(
                samplers.flow_sde,
                diffusion=SDE_DIFFUSION[sampler.diffusion],
                last_step=sampler.last_step,
                last_step_size=sampler.last_step_size,
            ),
        }
        return run[sampler.name](sampler.steps, velocity, x, noise)


def build_objective(diffusion: Diffusion) -> Objective:
    """The recipe's objective."""
    if diffusion.objective == "flow":
        return FlowObjective(diffusion.timesteps)
    return EpsilonObjective(
        linear_schedule(diffusion.timesteps, diffusion.beta_start, diffusion.beta_end)
    )


def visited_timesteps(diffusion: Diffusion, sampler: Sampler) -> list[float]:
    """The timesteps at which a sampler calls its denoiser, in order; used to count the NFE."""
    visited: list[float] = []

    def denoise(x: Tensor, t: float) -> Tensor:
        visited.append(float(t))
        channels = 2 if diffusion.objective == "epsilon" else 1
        return torch.zeros(1, channels, 1, 1)

    x = torch.zeros(1, 1, 1, 1)
    build_objective(diffusion).sample(sampler, denoise, x, lambda _: x)
    return visited
