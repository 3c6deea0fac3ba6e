"""Flow matching on the linear path, velocity prediction (SiT, Ma et al. 2024).

x_t = (1 - t) x_0 + t noise, so t = 1 is noise and v = dx_t / dt = noise - x_0.

Shapes: x (B, C, h, w); t (B,) in [0, 1]; model output (B, C, h, w).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _times(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def interpolate(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The point on the path at time t (SiT, equation 5, time reversed)."""
    return torch.lerp(x0, noise, _times(t, x0))


def flow_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity per image, (B,) (SiT, equation 7)."""
    return ((velocity - (noise - x0)) ** 2).flatten(1).mean(1)


def score(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Gradient of log p_t(x) for t > 0: -E[noise | x] / t (SiT, equation 9)."""
    t = _times(t, x)
    return -(x + (1.0 - t) * velocity) / t
