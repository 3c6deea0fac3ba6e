"""The objective and its samplers as a scheduler of diffusers; part of an exported folder."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffit_train.diffusion.generation import ImageNoise, generate_latents, weight_of_noise
from diffit_train.diffusion.objective import build_objective


class DiffiTScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Samples latents as training's own evaluation does.

    Args:
        diffusion: the recipe's section `diffusion`.
        sampler: its `evaluate.sampler`.
        guidance: its `evaluate.guidance`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, diffusion: dict, sampler: dict, guidance: dict) -> None:  # type: ignore[type-arg]
        self.objective = build_objective(_section(diffusion))

    def generate(
        self,
        network: Callable[[Tensor, Tensor, Tensor], Tensor],
        shape: tuple[int, int, int],
        seeds: list[int],
        labels: Tensor,
        null_label: int,
        steps: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Scaled latents (B, C, h, w), on the device of the labels.

        Args:
            network: x (B, C, h, w), t (B,) and labels (B,) to its fp32 output.
            shape: (C, h, w).
            seeds: of the noise of each image, (B,).
            labels: (B,).
            null_label: label of the unconditional passes of guidance.
            steps: of the sampler; None for the configured number.
            scale: of the guidance; None for the configured one.
        """
        sampler, guidance = _section(self.config.sampler), _section(self.config.guidance)
        if steps is not None:
            sampler.steps = steps
        if scale is not None:
            guidance.scale = scale
        noise = ImageNoise([(seed, 0) for seed in seeds], shape)
        weight = weight_of_noise(self.objective, guidance)
        return generate_latents(
            self.objective, sampler, guidance, weight, network, noise, labels, null_label
        )


def _section(values: dict[str, Any]) -> Any:
    """A section of a recipe, by attributes."""
    fields = {k: _section(v) if isinstance(v, dict) else v for k, v in values.items()}
    return SimpleNamespace(**fields)
