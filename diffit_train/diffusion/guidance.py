"""Classifier-free guidance (paper section 5.8 and appendix H.2; the published sampling code)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffit_train.config.evaluate import Guidance

Weight = Callable[[float], float]
Denoiser = Callable[[Tensor, float], Tensor]


def constant(scale: float) -> Weight:
    """A constant weight."""
    return lambda t: scale


def power_cosine(scale: float, power: float, timesteps: int = 1000) -> Weight:
    """w(t) = 1 + (scale - 1) / 2 * (1 - cos(pi * (1 - t / T)^power)): 1 at T, `scale` at 0."""

    def weight(t: float) -> float:
        return 1.0 + (scale - 1.0) / 2.0 * (
            1.0 - math.cos(math.pi * (1.0 - t / timesteps) ** power)
        )

    return weight


def interval(scale: float, low: float, high: float, timesteps: int = 1000) -> Weight:
    """`scale` where low <= t / T <= high, else 1 (Kynkäänniemi et al. 2024, equation 5)."""
    return lambda t: scale if low <= t / timesteps <= high else 1.0


def build_weight(guidance: Guidance, timesteps: int) -> Weight:
    """The recipe's guidance weight as a function of the timestep."""
    if guidance.kind == "constant":
        return constant(guidance.scale)
    if guidance.kind == "power_cosine":
        return power_cosine(guidance.scale, guidance.power, timesteps)
    if guidance.kind == "interval":
        return interval(guidance.scale, guidance.low, guidance.high, timesteps)
    return constant(1.0)


def saved_share(weight: Weight, timesteps: list[float], skip_within: float) -> float:
    """Fraction of the NFE saved by skipping idle unconditional passes.

    Args:
        timesteps: timestep of every call to the denoiser.
    """
    idle = sum(abs(weight(t) - 1.0) <= skip_within for t in timesteps)
    return idle / (2.0 * len(timesteps))


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    weight: Weight,
    channels: int,
    skip_within: float = 0.0,
) -> Denoiser:
    """A denoiser (x, t) with classifier-free guidance.

    Only the first `channels` output channels are guided, u + w(t) (c - u); the other channels,
    including the variance, are the conditional ones. All images share one t, a number on the host:
    to read it from a GPU would make the host wait at every step.

    Args:
        model: (x, t, labels) to (B, O, h, w); t (B,) is on the device of x.
        labels: (B,), the classes to generate.
        skip_within: skip the unconditional pass if |w(t) - 1| is at most this.
    """
    null = torch.full_like(labels, null_label)

    def denoise(x: Tensor, t: float) -> Tensor:
        w = weight(t)
        if abs(w - 1.0) <= skip_within:
            return model(x, repeated(t, x), labels)
        wide = torch.cat([x, x])
        both = model(wide, repeated(t, wide), torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        difference = conditional[:, :channels] - unconditional[:, :channels]
        noise = unconditional[:, :channels] + w * difference
        return torch.cat([noise, conditional[:, channels:]], dim=1)

    return denoise


def repeated(t: float, x: Tensor) -> Tensor:
    """A timestep for each image of x, (B,), filled on the device; int64 if t is an integer."""
    dtype = torch.long if isinstance(t, int) else torch.promote_types(x.dtype, torch.float32)
    return torch.full((len(x),), t, dtype=dtype, device=x.device)
