"""EMA of the fp32 master weights, with the same sharding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffit_train.config.train import EmaProfile
from diffit_train.runs.phema import power_exponent


def ema_decay(profile: EmaProfile, step: int, batch_size: int) -> float:
    """EMA decay in the update after training step `step` (the first is 0).

    Constant; EDM's half-life of `half_life_images`, at most `ramp_ratio` of the images seen
    before the step (EDM, training_loop.py); or (1 - 1/t)^(gamma + 1) with t = step + 1, which
    makes the profile a power function of training time (EDM2, section 3.1).
    """
    if profile.decay is not None:
        return profile.decay
    if profile.half_life_images is not None:
        half_life = profile.half_life_images
        if profile.ramp_ratio is not None:
            half_life = min(half_life, step * batch_size * profile.ramp_ratio)
        return 0.5 ** (batch_size / half_life) if half_life > 0.0 else 0.0
    assert profile.sigma_rel is not None
    return (1.0 - 1.0 / (step + 1)) ** (power_exponent(profile.sigma_rel) + 1.0)


class ShardedEMA:
    """EMA of tensors: ema <- decay * ema + (1 - decay) * weights, in fp32.

    Each rank averages only the master weights it owns, so no rank ever holds a full copy; the
    shards together equal the EMA of the full weights, bit for bit.

    Args:
        sources: this rank's fp32 master weights.
        profiles: the EMAs to keep, by name.
        batch_size: images per step.
    """

    def __init__(
        self, sources: list[Tensor], profiles: Mapping[str, EmaProfile], batch_size: int
    ) -> None:
        self.sources, self.profiles, self.batch_size = sources, dict(profiles), batch_size
        self.averages = {name: [s.detach().clone() for s in sources] for name in profiles}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update with the weights after training step `step`."""
        for name, profile in self.profiles.items():
            decay = ema_decay(profile, step, self.batch_size)
            if self.sources:
                torch._foreach_lerp_(self.averages[name], self.sources, 1.0 - decay)
