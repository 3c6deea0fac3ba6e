"""Samplers: plain functions of one signature over any denoiser and a list of noise levels,

    sampler(levels, denoise, x, noise) -> x_0

where x (B, C, h, w) is standard normal, and `noise(i)` returns fresh standard normal noise for step
i, so that a caller can seed every image separately. Levels and denoisers belong together:

    ADM's diffusion  `Schedule`, the respaced diffusion; `denoise(x, t)` takes the original timestep
                     t, an integer, and returns (B, 2C, h, w), predicted noise first
    the flow         times from 1 to 0; `denoise(x, t)` returns the velocity (B, C, h, w)
    EDM              sigmas from the highest to 0; `denoise(x, sigma)` returns x_0 (B, C, h, w)

No sampler reads from the device of x or waits for it: times and coefficients are on the host, and
tables are copied once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffit_train.diffusion.flow import score
from diffit_train.diffusion.gaussian import learned_log_variance, posterior_mean, predict_x0
from diffit_train.diffusion.guidance import Denoiser, repeated
from diffit_train.diffusion.schedule import Schedule

Noise = Callable[[int], Tensor]
Levels = TypeVar("Levels")
SamplerFunction = Callable[[Levels, Denoiser, Tensor, Noise], Tensor]


# ---- ADM's diffusion ----


def _predict(
    schedule: Schedule, denoise: Denoiser, x: Tensor, i: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Step index (B,), predicted noise and variance values at step i."""
    noise, values = denoise(x, int(schedule.timesteps[i])).chunk(2, dim=1)
    return repeated(i, x), noise, values


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
    """DDIM (Song et al. 2021, equation 12); eta 0 is deterministic and never calls `noise`."""
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


def dpmpp_2m(schedule: Schedule, denoise: Denoiser, x: Tensor, noise: Noise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), a second-order multistep method.

    Deterministic; NFE = steps. The first and last steps are first-order, the last because it ends
    at zero noise, where the log signal-to-noise ratio is infinite.
    """
    signal, sigma = np.sqrt(schedule.alpha_bar), np.sqrt(1.0 - schedule.alpha_bar)
    log_ratio = np.log(signal / sigma)
    before: Tensor | None = None
    for i in reversed(range(len(schedule))):
        index, predicted, _ = _predict(schedule, denoise, x, i)
        x0 = predict_x0(schedule, x, index, predicted)
        if i == 0:
            return x0
        step = log_ratio[i - 1] - log_ratio[i]
        estimate = x0
        if before is not None:
            ratio = (log_ratio[i] - log_ratio[i + 1]) / step
            estimate = x0 + (x0 - before) / float(2.0 * ratio)
        kept = float(sigma[i - 1] / sigma[i])
        x = kept * x - float(signal[i - 1] * math.expm1(-step)) * estimate
        before = x0
    return x


def heun(schedule: Schedule, denoise: Denoiser, x: Tensor, noise: Noise) -> Tensor:
    """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1).

    In y = x / sqrt(alpha_bar) and s = sqrt(1 / alpha_bar - 1) the ODE is dy / ds = predicted
    noise. Deterministic; two evaluations per step, but one in the last step, which ends at s = 0.
    """
    signal = np.sqrt(schedule.alpha_bar)
    s = np.sqrt(1.0 / schedule.alpha_bar - 1.0)
    last = len(schedule) - 1
    y = x / float(signal[last])
    for i in reversed(range(len(schedule))):
        _, slope, _ = _predict(schedule, denoise, y * float(signal[i]), i)
        if i == 0:
            return y - float(s[0]) * slope
        width = float(s[i - 1] - s[i])
        ahead = y + width * slope
        _, slope_ahead, _ = _predict(schedule, denoise, ahead * float(signal[i - 1]), i - 1)
        y = y + width * 0.5 * (slope + slope_ahead)
    return y


# ---- The flow ----


def flow_euler(times: Sequence[float], velocity: Denoiser, x: Tensor, noise: Noise) -> Tensor:
    """Euler's method on the flow's ODE. Deterministic."""
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * velocity(x, now)
    return x


def flow_heun(times: Sequence[float], velocity: Denoiser, x: Tensor, noise: Noise) -> Tensor:
    """Heun's method on the flow's ODE. Deterministic; two evaluations per step."""
    for now, then in itertools.pairwise(times):
        width = then - now
        slope = velocity(x, now)
        slope_ahead = velocity(x + width * slope, then)
        x = x + width * 0.5 * (slope + slope_ahead)
    return x


def flow_sde(
    times: Sequence[float],
    velocity: Denoiser,
    x: Tensor,
    noise: Noise,
    diffusion: float = 2.0,
    last_step: Literal["mean", "euler"] = "mean",
) -> Tensor:
    """Euler-Maruyama on the flow's reverse SDE with w(t) = diffusion * sigma(t) (SiT, equation 4).

    In reverse time, dx = (v - w / 2 * score) dt + sqrt(w) dW, with sigma(t) = t. The score divides
    by t, so the last step, from times[-2] to 0, is taken without noise (SiT: from 0.04).

    Args:
        diffusion: 2 matches SiT's sampling script: its `--diffusion-form sigma` multiplies the
            score by sigma and the noise by sqrt(2 sigma).
        last_step: along the SDE's drift (`mean`, SiT's default) or along the velocity (`euler`).
    """

    def drift(x: Tensor, t: float) -> Tensor:
        slope = velocity(x, t)
        return slope - 0.5 * diffusion * t * score(slope, x, repeated(t, x))

    *noisy, _ = times
    for i, (now, then) in enumerate(itertools.pairwise(noisy)):
        width = now - then
        x = x - width * drift(x, now) + math.sqrt(diffusion * now * width) * noise(i)
    now = noisy[-1]
    slope = drift(x, now) if last_step == "mean" else velocity(x, now)
    return x - now * slope


# ---- EDM ----


def edm_heun(
    sigmas: Sequence[float],
    denoise: Denoiser,
    x: Tensor,
    noise: Noise,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
) -> Tensor:
    """Heun's method on dx / dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, algorithm 2).

    Two evaluations per step, but one in the last step. Deterministic without churn.

    Args:
        churn: S_churn; each step first raises sigma by at most churn / steps of itself.
        churn_range: S_min and S_max, the sigmas at which it does so.
        churn_noise: S_noise, standard deviation of the noise that this adds.
    """
    steps = len(sigmas) - 1
    most = min(churn / steps, math.sqrt(2.0) - 1.0)
    x = sigmas[0] * x
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        if most > 0.0 and churn_range[0] <= now <= churn_range[1]:
            raised = now * (1.0 + most)
            added = math.sqrt(raised**2 - now**2) * churn_noise
            x, now = x + added * noise(i).to(x.dtype), raised
        slope = (x - denoise(x, now)) / now
        ahead = x + (then - now) * slope
        if then > 0.0:
            slope_ahead = (ahead - denoise(ahead, then)) / then
            ahead = x + (then - now) * 0.5 * (slope + slope_ahead)
        x = ahead
    return x
