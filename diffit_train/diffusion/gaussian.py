"""ADM's Gaussian diffusion: forward process, learned-range variance and training loss.

Shapes: x (B, C, h, w); t (B,) indices into the schedule; model output (B, 2C, h, w), noise first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffit_train.diffusion.schedule import Schedule


def add_noise(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, equation 4)."""
    return schedule.at("signal", t, x0) * x0 + schedule.at("sigma", t, x0) * noise


def predict_x0(schedule: Schedule, xt: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_0 from x_t and the noise: the inverse of `add_noise`."""
    return schedule.at("inverse_signal", t, xt) * xt - schedule.at("noise_ratio", t, xt) * noise


def posterior_mean(schedule: Schedule, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equation 7)."""
    weighted = schedule.at("posterior_mean_x0", t, x0) * x0
    return weighted + schedule.at("posterior_mean_xt", t, xt) * xt


def learned_log_variance(schedule: Schedule, values: Tensor, t: Tensor) -> Tensor:
    """Interpolate between the posterior's log-variance (-1) and log beta (+1).

    Nichol and Dhariwal 2021, equation 15.
    """
    low = schedule.at("posterior_log_variance", t, values)
    high = schedule.at("log_beta", t, values)
    fraction = (values + 1.0) / 2.0
    return fraction * high + (1.0 - fraction) * low


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Elementwise KL divergence of two normal distributions, in nats."""
    ratio = torch.exp(log_var1 - log_var2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_var2)
    return 0.5 * (-1.0 + log_var2 - log_var1 + ratio + distance)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of x in [-1, 1] rounded to 256 levels (Ho et al. 2020, equation 13)."""

    def cdf(value: Tensor) -> Tensor:
        # ADM's tanh approximation, to match its losses up to rounding.
        inner = math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)
        return 0.5 * (1.0 + torch.tanh(inner))

    inverse = torch.exp(-log_scale)
    upper = cdf(inverse * (x - mean + 1.0 / 255.0))
    lower = cdf(inverse * (x - mean - 1.0 / 255.0))
    inside = (upper - lower).clamp(min=1e-12).log()
    below = upper.clamp(min=1e-12).log()
    above = (1.0 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


def variational_bound(
    schedule: Schedule, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor, values: Tensor
) -> Tensor:
    """One term of the variational bound per image, (B,), in bits per dimension.

    KL from the posterior to the model's step; at t = 0, the decoder's negative log-likelihood.
    """
    true_mean = posterior_mean(schedule, x0, xt, t)
    mean = posterior_mean(schedule, predict_x0(schedule, xt, t, noise), xt, t)
    log_variance = learned_log_variance(schedule, values, t)
    true_log_variance = schedule.at("posterior_log_variance", t, x0)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    first = (t == 0).view(-1, *[1] * (x0.dim() - 1))
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2.0)


@dataclass(frozen=True)
class Loss:
    """Losses per image, (B,): the total to minimize, and its two terms."""

    total: Tensor
    mse: Tensor
    vb: Tensor


def training_loss(schedule: Schedule, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> Loss:
    """Mean squared error of the noise plus the variational bound (ADM).

    The bound trains only the variance: the mean is detached.

    Args:
        output: the model's prediction for `add_noise(schedule, x0, t, noise)`, (B, 2C, h, w).
    """
    predicted, values = output.chunk(2, dim=1)
    mse = ((predicted - noise) ** 2).flatten(1).mean(1)
    xt = add_noise(schedule, x0, t, noise)
    vb = variational_bound(schedule, x0, xt, t, predicted.detach(), values)
    return Loss(mse + vb, mse, vb)
