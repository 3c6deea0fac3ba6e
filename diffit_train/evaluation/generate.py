"""Pictures from a model: picture i depends on the seed and i alone, not on its batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffit_train.config import Recipe
from diffit_train.data.autoencoder import Autoencoder
from diffit_train.diffusion import guidance, samplers
from diffit_train.diffusion.schedule import evenly_spaced, linear_schedule, respace
from diffit_train.errors import DiffitError
from diffit_train.models.build import build_model

# Set when the model is made, not learned, so no checkpoint holds them.
_FIXED = ("pos_embed", "relative_position_index")


class PictureNoise:
    """Standard normal noise (B, C, h, w), each picture's from its own generator.

    Args:
        seed: of the evaluation.
        indices: of the pictures, (B,).
        shape: (C, h, w).
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.generators = [
            np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
            for index in indices
        ]

    def __call__(self, device: torch.device) -> Tensor:
        """The next noise of every picture."""
        rows = [g.standard_normal(self.shape, dtype=np.float32) for g in self.generators]
        return torch.from_numpy(np.stack(rows)).to(device)


class Generator:
    """A checkpoint's model with the recipe's sampler, guidance and autoencoder.

    Args:
        weights: every trainable parameter by name.

    Raises:
        DiffitError: the weights are of another model.
    """

    def __init__(
        self, recipe: Recipe, weights: dict[str, Tensor], autoencoder: Autoencoder
    ) -> None:
        self.recipe, self.autoencoder = recipe, autoencoder
        self.device = autoencoder.device
        self.model = _with_weights(build_model(recipe), weights).to(self.device)
        diffusion, sampler = recipe.diffusion, recipe.evaluate.sampler
        whole = linear_schedule(diffusion.timesteps, diffusion.beta_start, diffusion.beta_end)
        self.schedule = respace(whole, evenly_spaced(diffusion.timesteps, sampler.steps))
        self.sampler = (
            samplers.ddpm
            if sampler.name == "ddpm"
            else functools.partial(samplers.ddim, eta=sampler.eta)
        )
        section = recipe.evaluate.guidance
        self.weight = (
            guidance.constant(section.scale)
            if section.kind == "constant"
            else guidance.power_cosine(section.scale, section.power, diffusion.timesteps)
        )

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (B, R, R, 3) uint8 and labels (B,); picture i is of class i mod classes."""
        classes, size = self.recipe.data.num_classes, self.recipe.latent_size
        labels = np.array(indices, dtype=np.int64) % classes
        shape = (self.recipe.autoencoder.latent_channels, size, size)
        noise = PictureNoise(self.recipe.evaluate.seed, indices, shape)
        denoise = guidance.guided(
            self.model,
            torch.from_numpy(labels).to(self.device),
            classes,
            self.weight,
            self.recipe.evaluate.guidance.channels,
        )
        start = noise(self.device)
        latents = self.sampler(self.schedule, denoise, start, lambda _: noise(self.device))
        return self.autoencoder.decode(latents), labels


def _with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    try:
        answer = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise DiffitError(f"the checkpoint is of another model: {reason}") from error
    missing = [name for name in answer.missing_keys if not name.endswith(_FIXED)]
    if missing or answer.unexpected_keys:
        raise DiffitError(
            f"the checkpoint is of another model: it lacks {missing[:3]} and has "
            f"{answer.unexpected_keys[:3]} too many"
        )
    return model.eval().requires_grad_(False)
