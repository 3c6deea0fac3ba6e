"""Classifier-free guidance (paper section 5.8 and appendix H.2; the published sampling code)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weight = Callable[[float], float]
Denoiser = Callable[[Tensor, Tensor], Tensor]


def constant(scale: float) -> Weight:
    """The same weight at every timestep."""
    return lambda t: scale


def power_cosine(scale: float, power: float, timesteps: int = 1000) -> Weight:
    """w(t) = 1 + (scale - 1) / 2 * (1 - cos(pi * (1 - t / T)^power)): 1 at T, `scale` at 0."""

    def weight(t: float) -> float:
        return 1.0 + (scale - 1.0) / 2.0 * (
            1.0 - math.cos(math.pi * (1.0 - t / timesteps) ** power)
        )

    return weight


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    weight: Weight,
    channels: int,
) -> Denoiser:
    """A denoiser (x, t) of conditional model output pushed away from the unconditional one.

    Only the first `channels` channels of the predicted noise are guided, eps = u + w(t) (c - u);
    the other channels and the variance stay the conditional ones. All pictures share one t.

    Args:
        model: (x, t, labels) to (B, 2C, h, w).
        labels: (B,), the classes asked for.
    """
    null = torch.full_like(labels, null_label)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        w = weight(float(t[0]))
        if w == 1.0:
            return model(x, t, labels)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        difference = conditional[:, :channels] - unconditional[:, :channels]
        noise = unconditional[:, :channels] + w * difference
        return torch.cat([noise, conditional[:, channels:]], dim=1)

    return denoise
