"""Classifier-free guidance (paper section 5.8 and appendix H.2; the published sampling code).

Weights are functions of the noise level in [0, 1], as `Objective.level` gives it: 1 is pure noise.
"""

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
    return lambda level: scale


def power_cosine(scale: float, power: float) -> Weight:
    """w(u) = 1 + (scale - 1) / 2 * (1 - cos(pi * (1 - u)^power)): 1 at u = 1, `scale` at 0."""

    def weight(level: float) -> float:
        return 1.0 + (scale - 1.0) / 2.0 * (1.0 - math.cos(math.pi * (1.0 - level) ** power))

    return weight


def interval(scale: float, low: float, high: float) -> Weight:
    """`scale` where low <= level <= high, else 1 (Kynkäänniemi et al. 2024, equation 5)."""
    return lambda level: scale if low <= level <= high else 1.0


def build_weight(guidance: Guidance) -> Weight:
    """The recipe's guidance weight."""
    if guidance.kind == "none":
        return constant(1.0)
    if guidance.kind == "power_cosine":
        return power_cosine(guidance.scale, guidance.power)
    if guidance.kind == "interval":
        return interval(guidance.scale, guidance.low, guidance.high)
    return constant(guidance.scale)


def skipped_fraction(weight: Weight, levels: list[float], skip_within: float) -> float:
    """Fraction of the NFE saved by skipping idle unconditional passes.

    Args:
        levels: noise level of every call to the denoiser.
    """
    idle = sum(abs(weight(level) - 1.0) <= skip_within for level in levels)
    return idle / (2.0 * len(levels))


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
        weight: of the denoiser's own t.
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
