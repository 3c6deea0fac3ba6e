"""Latents from a network: image i depends on its key and label only, not on its batch.

Shapes: B images, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffit_train.config.evaluate import Guidance, Sampler
from diffit_train.diffusion.guidance import Weight, build_weight, guided
from diffit_train.diffusion.objective import Objective


class ImageNoise:
    """Standard normal noise (B, C, h, w), with one generator per image.

    Args:
        keys: (seed, index) of each image, (B,).
        shape: (C, h, w).
    """

    def __init__(self, keys: Sequence[tuple[int, int]], shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.generators = [
            np.random.Generator(np.random.Philox(np.random.SeedSequence(key))) for key in keys
        ]

    def __call__(self, device: torch.device) -> Tensor:
        """The next noise of every image."""
        rows = [g.standard_normal(self.shape, dtype=np.float32) for g in self.generators]
        drawn = torch.from_numpy(np.stack(rows))
        if device.type == "cuda":
            # From pageable memory the copy would wait for the step before.
            drawn = drawn.pin_memory()
        return drawn.to(device, non_blocking=True)


def weight_of_noise(objective: Objective, guidance: Guidance) -> Weight:
    """The guidance weight by the objective's own noise levels."""
    weight = build_weight(guidance)
    return lambda t: weight(objective.level(t))


def generate_latents(
    objective: Objective,
    sampler: Sampler,
    guidance: Guidance,
    weight: Weight,
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: ImageNoise,
    labels: Tensor,
    null_label: int,
    watch: Callable[[Tensor, Tensor, float], None] | None = None,
) -> Tensor:
    """Scaled latents (B, C, h, w), on the device of the labels.

    Args:
        weight: `weight_of_noise`.
        network: preconditioned x (B, C, h, w), t (B,) and labels (B,) to its fp32 output.
        labels: (B,), the classes to generate; ignored by a network without labels.
        null_label: label of the unconditional passes of guidance.
        watch: given the guided output, and x and t of each call of the denoiser.
    """

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, t = objective.precondition(x, t)
        return network(x, t, y)

    channels, skip_within = noise.shape[0], 0.0
    if guidance.kind != "none":
        skip_within = guidance.skip_within
        channels = channels if guidance.channels == "all" else guidance.channels
    denoise = guided(predict, labels, null_label, weight, channels, skip_within)

    def watched(x: Tensor, t: float) -> Tensor:
        output = denoise(x, t)
        if watch is not None:
            watch(output, x, t)
        return output

    fresh = noise(labels.device)
    return objective.sample(sampler, watched, fresh, lambda _: noise(labels.device))
