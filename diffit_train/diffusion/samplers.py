"""Samplers: plain functions over any denoiser, one signature for all.

    sampler(schedule, denoise, x, noise) -> x_0

`schedule` is the respaced diffusion; `denoise(x, t)` gets the original timesteps t (B,) and
returns (B, 2C, h, w); x (B, C, h, w) is standard normal; `noise(i)` gives the fresh standard
normal noise of step i, so that a caller may seed every picture by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffit_train.diffusion.gaussian import learned_log_variance, posterior_mean, predict_x0
from diffit_train.diffusion.guidance import Denoiser
from diffit_train.diffusion.schedule import Schedule

Noise = Callable[[int], Tensor]


def _predict(
    schedule: Schedule, denoise: Denoiser, x: Tensor, i: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Step index (B,), predicted noise and variance values at step i."""
    index = torch.full((len(x),), i, dtype=torch.long, device=x.device)
    timestep = torch.full_like(index, int(schedule.timesteps[i]))
    noise, values = denoise(x, timestep).chunk(2, dim=1)
    return index, noise, values


def ddpm(schedule: Schedule, denoise: Denoiser, x: Tensor, noise: Noise) -> Tensor:
    """Ancestral sampling with the learned variance (Ho et al. 2020, algorithm 2; ADM)."""
    for i in reversed(range(len(schedule))):
        index, predicted, values = _predict(schedule, denoise, x, i)
        mean = posterior_mean(schedule, predict_x0(schedule, x, index, predicted), x, index)
        if i == 0:
            return mean
        x = mean + torch.exp(0.5 * learned_log_variance(schedule, values, index)) * noise(i)
    return x


def ddim(
    schedule: Schedule, denoise: Denoiser, x: Tensor, noise: Noise, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12); eta 0 is deterministic and never asks for noise."""
    alpha_bar, previous = schedule.alpha_bar, schedule.alpha_bar_previous
    for i in reversed(range(len(schedule))):
        index, predicted, _ = _predict(schedule, denoise, x, i)
        x0 = predict_x0(schedule, x, index, predicted)
        sigma = eta * float(np.sqrt((1 - previous[i]) / (1 - alpha_bar[i]) * schedule.betas[i]))
        direction = float(np.sqrt(1 - previous[i] - sigma**2))
        x = float(np.sqrt(previous[i])) * x0 + direction * predicted
        if sigma > 0 and i > 0:
            x = x + sigma * noise(i)
    return x
