"""The autoencoder: diffusers' AutoencoderKL or AutoencoderTiny, or the identity; with a scale.

Shapes: B images, R x R pixels, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import UserError

# diffusers' bounds on the posterior's log-variance.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
# Images are encoded and decoded in slices whose activations take at most about this much memory. A
# constant, so that results do not depend on how much a device has left.
SLICE_BYTES = 8 * storage.GIB
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def scaled_sample(moments: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Sample scaled latents (B, C, h, w) from the posterior.

    Args:
        moments: mean and log-variance (B, 2C, h, w), or latents (B, C, h, w) without posterior.
        noise: (B, C, h, w), standard normal.
    """
    if moments.shape[1] == noise.shape[1]:
        return scale * moments.float()
    mean, log_variance = moments.float().chunk(2, dim=1)
    return scale * (mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)) * noise)


@dataclass
class LoadedAutoencoder:
    """A frozen autoencoder on a device; `scale` multiplies its latents.

    `model` is None for the identity, whose latents are pixels in [-1, 1].
    """

    model: Any
    id: str
    scale: float
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def encode_moments(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, R, R) float32 in [-1, 1] to mean then log-variance, (B, 2C, h, w), unscaled.

        An autoencoder without posterior returns its latents, (B, C, h, w).
        """
        if self.model is None:
            return pixels
        slices = self._slices(torch.from_numpy(pixels), *pixels.shape[-2:])
        return torch.cat([self._encode(x.to(self.device, self.dtype)) for x in slices]).numpy()

    def _encode(self, x: Tensor) -> Tensor:
        encoded = self.model.encode(x)
        latents = getattr(encoded, "latents", None)
        if latents is None:
            latents = encoded.latent_dist.parameters
        return cast(Tensor, latents).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor, pixels: Literal["round", "truncate"] = "round") -> np.ndarray:
        """Scaled latents (B, C, h, w) to images (B, R, R, 3), uint8.

        Args:
            pixels: round to the nearest level, or truncate to the next lower one.
        """
        x = latents / self.scale
        if self.model is None:
            return _levels(x, pixels).numpy()
        height, width = (side * downsampling(self.model) for side in latents.shape[-2:])
        decoded = [
            _levels(self.model.decode(part.to(self.device, self.dtype)).sample, pixels)
            for part in self._slices(x, height, width)
        ]
        return torch.cat(decoded).numpy()

    def _slices(self, x: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Equal parts of a batch, each small enough for `SLICE_BYTES`.

        Args:
            height, width: of the images, in pixels.
        """
        widths = _widths(self.model)
        # Measured on the autoencoder of Stable Diffusion: a decoder holds 3 times the channels of
        # the stage before the last, at full resolution (768 values a pixel), an encoder fewer.
        values = 3 * max(widths[:2]) * height * width
        most = max(1, SLICE_BYTES // (values * self.dtype.itemsize))
        return x.tensor_split(max(1, math.ceil(len(x) / most)))

    def weight_hash(self) -> str:
        """SHA-256 over names, shapes and bytes of the weights, sorted by name."""
        out = hashlib.sha256()
        weights = {} if self.model is None else self.model.state_dict()
        for name, value in sorted(weights.items()):
            out.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            out.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return out.hexdigest()


def _levels(x: Tensor, pixels: Literal["round", "truncate"]) -> Tensor:
    """Images (B, 3, R, R) in [-1, 1] to (B, R, R, 3) uint8 on the host."""
    levels = (x.float() + 1.0) * 127.5
    if pixels == "round":
        levels = levels.round()
    return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def autoencoder_url(recipe: Recipe) -> str:
    """The recipe's autoencoder: a folder or a hub id."""
    return storage.resolve(recipe.storage.root, recipe.autoencoder.source)


def load_autoencoder(recipe: Recipe, device: torch.device) -> LoadedAutoencoder:
    """The recipe's autoencoder, frozen.

    Raises:
        UserError: it is not available, or its latent shape is not the recipe's.
    """
    url, section = autoencoder_url(recipe), recipe.autoencoder
    dtype = _DTYPES[section.precision]
    if section.kind == "identity":
        return LoadedAutoencoder(None, "identity", section.scale or 1.0, device, torch.float32)
    hub = url == section.source and not _is_path(url)
    model = _load_model(url, section.kind, dtype, hub)
    channels, factor = model.config.latent_channels, downsampling(model)
    for key, mine, theirs in (
        ("latent_channels", section.latent_channels, channels),
        ("downsample", section.downsample, factor),
    ):
        if mine != theirs:
            raise UserError(
                f"autoencoder.{key} is {mine}, but {url} has {theirs}; set it to {theirs}"
            )
    scale = section.scale if section.scale is not None else float(model.config.scaling_factor)
    model = model.to(device).eval().requires_grad_(False)
    return LoadedAutoencoder(model, section.source, scale, device, dtype)


def downsampling(model: Any) -> int:
    """Downsampling factor of an autoencoder in each direction."""
    return 2 ** (len(_widths(model)) - 1)


def _widths(model: Any) -> tuple[int, ...]:
    """Channels of an AutoencoderKL's or AutoencoderTiny's stages, from full resolution on."""
    config = dict(model.config)
    return tuple(config.get("encoder_block_out_channels") or config["block_out_channels"])


def _is_path(source: str) -> bool:
    """Whether a source is a path; a hub id is NAME/NAME and not an existing folder."""
    return "://" in source or source.startswith(("/", ".", "~")) or Path(source).exists()


def _load_model(url: str, kind: str, dtype: torch.dtype, hub: bool) -> Any:
    # Download progress bars only fill the logs of actors.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from diffusers import AutoencoderKL, AutoencoderTiny

    model_class = AutoencoderTiny if kind == "tiny" else AutoencoderKL
    if not hub and not storage.exists(storage.join(url, "config.json")):
        raise UserError(
            f"autoencoder {url} does not exist; run `diffit autoencoder fit`, or set "
            "autoencoder.source to a folder in diffusers' format or a hub id"
        )
    # Explicit, because diffusers warns when it falls back to this.
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    try:
        if hub or storage.is_local(url):
            return model_class.from_pretrained(url, **options)
        with storage.local_folder(url) as folder:
            return model_class.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"autoencoder.source {url} cannot be loaded: {reason}; set it to a folder in "
            f"diffusers' format or the hub id of an {model_class.__name__}"
        ) from error
