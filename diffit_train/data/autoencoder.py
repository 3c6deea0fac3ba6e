"""The autoencoder: diffusers' AutoencoderKL or AutoencoderTiny, or the identity; with a scale.

Shapes: B images, R x R pixels, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.autoencoder_memory import (
    Part,
    activation_values,
    budget_bytes,
    slice_size,
)
from diffit_train.data.shards import MANIFEST, latents_url, load_manifest
from diffit_train.errors import UserError, first_line
from diffit_train.models.precision import cudnn_benchmark, tf32

T = TypeVar("T", np.ndarray, Tensor)
# diffusers' bounds on the posterior's log-variance.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def sample_latent(moments: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Sample scaled latents (B, C, h, w) from the posterior.

    Args:
        moments: mean and log-variance (B, 2C, h, w), or latents (B, C, h, w) without posterior.
        noise: (B, C, h, w), standard normal.
    """
    if moments.shape[1] == noise.shape[1]:
        return scale * moments.float()
    mean, log_variance = moments.float().chunk(2, dim=1)
    return scale * (mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)) * noise)


def to_uint8(x: Tensor, pixels: Literal["round", "truncate"]) -> Tensor:
    """Images (B, 3, R, R) in [-1, 1] to levels (B, R, R, 3), uint8."""
    levels = (x.float() + 1.0) * 127.5
    if pixels == "round":
        levels = levels.round()
    return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@dataclass
class LoadedAutoencoder:
    """A frozen autoencoder on a device; `scale` multiplies its latents.

    `model` is None for the identity, whose latents are pixels in [-1, 1]. It works on slices of a
    batch whose activations fit a budget; see `autoencoder_memory`.

    Attributes:
        tf32: whether a GPU may round the inputs of fp32 convolutions and products to TF32.
        budget: bytes of activations at once; None for `budget_bytes` of the device.
        search: whether cuDNN searches for the fastest algorithms of decoding.
    """

    model: Any
    id: str
    scale: float
    device: torch.device
    dtype: torch.dtype
    tf32: bool = False
    budget: int | None = None
    search: bool = True

    @torch.no_grad()
    def encode_moments(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, R, R) float32 in [-1, 1] to mean then log-variance, (B, 2C, h, w), unscaled.

        An autoencoder without posterior returns its latents, (B, C, h, w).
        """
        if self.model is None:
            return pixels
        size = self._slice_size("encode", len(pixels), pixels.shape[-1] ** 2)
        # Here cuDNN does not search: what it finds is not the same each time, but shards must be.
        with tf32(self.tf32):
            return np.concatenate([self._moments(part) for part in _slices(pixels, size)])

    def _moments(self, pixels: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(pixels).to(self.device, self.dtype)
        encoded = self.model.encode(x)
        latents = getattr(encoded, "latents", None)
        if latents is None:
            latents = encoded.latent_dist.parameters
        return latents.float().cpu().numpy()

    @torch.no_grad()
    def decode(self, latents: Tensor, pixels: Literal["round", "truncate"] = "round") -> np.ndarray:
        """Scaled latents (B, C, h, w) to images (B, R, R, 3), uint8.

        Args:
            pixels: round to the nearest level, or truncate to the next lower one.
        """
        side = latents.shape[-1]
        if self.model is not None:
            side *= _downsampling(self.model)
        size = self._slice_size("decode", len(latents), side**2)
        with tf32(self.tf32), cudnn_benchmark(self.search):
            images = [self._decoded(part, pixels) for part in _slices(latents, size)]
        return np.concatenate(images)

    def _decoded(self, latents: Tensor, pixels: Literal["round", "truncate"]) -> np.ndarray:
        x = latents / self.scale
        if self.model is not None:
            x = self.model.decode(x.to(self.device, self.dtype)).sample
        return to_uint8(x, pixels).cpu().numpy()

    def _slice_size(self, part: Part, images: int, pixels: int) -> int:
        """Images at once, of `pixels` pixels each."""
        if self.model is None:
            return max(1, images)
        values = activation_values(self.model.config, _kind(self.model), part)
        budget = budget_bytes(self.device) if self.budget is None else self.budget
        return slice_size(images, values * pixels * self.dtype.itemsize, budget)

    def weight_hash(self) -> str:
        """SHA-256 over names, shapes and bytes of the weights, sorted by name."""
        out = hashlib.sha256()
        weights = {} if self.model is None else self.model.state_dict()
        for name, value in sorted(weights.items()):
            out.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            out.update(
                value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
            )
        return out.hexdigest()


def autoencoder_url(recipe: Recipe) -> str:
    """The recipe's autoencoder: a folder or a hub id."""
    return storage.resolve(recipe.storage.root, recipe.autoencoder.source)


def load_autoencoder(recipe: Recipe, device: torch.device) -> LoadedAutoencoder:
    """The recipe's autoencoder, frozen.

    Raises:
        UserError: it is not available, or its latent shape is not the recipe's.
    """
    url, section = autoencoder_url(recipe), recipe.autoencoder
    if section.kind == "identity":
        return LoadedAutoencoder(None, "identity", 1.0, device, torch.float32)
    dtype = _DTYPES[section.precision]
    hub = url == section.source and not is_path(url)
    model = _load_model(url, section.kind, dtype, hub)
    channels, factor = model.config.latent_channels, _downsampling(model)
    for key, mine, theirs in (
        ("latent_channels", section.latent_channels, channels),
        ("downsample", section.downsample, factor),
    ):
        if mine != theirs:
            raise UserError(
                f"autoencoder.{key} is {mine}, but {url} has {theirs}; set it to {theirs}"
            )
    scale = section.scale if section.scale is not None else float(model.config.scaling_factor)
    model = model.to(device, memory_format=_layout(device)).eval().requires_grad_(False)
    rounded = section.precision == "tf32"
    loaded = LoadedAutoencoder(model, section.name, scale, device, dtype, rounded)
    if section.alias:
        _require_known_weights(recipe, loaded)
    return loaded


def _require_known_weights(recipe: Recipe, loaded: LoadedAutoencoder) -> None:
    """Refuse weights under a name that are not those that the latents were encoded with."""
    url = latents_url(recipe)
    if not storage.exists(storage.join(url, MANIFEST)):
        return
    if loaded.weight_hash() != load_manifest(url).autoencoder_sha256:
        raise UserError(
            f"autoencoder.alias is {loaded.id}, but the weights at {autoencoder_url(recipe)} "
            f"are not those that {url} was encoded with; set autoencoder.source to a copy of them"
        )


def _layout(device: torch.device) -> torch.memory_format:
    """Layout of the convolutions' weights, which their results take over.

    On a CPU channels last is faster, by `tests.benchmarks.autoencoder`. On CUDA nothing has been
    measured, and group norm would copy each tensor back.
    """
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def _slices(rows: T, size: int) -> list[T]:
    """Slices of an array or a tensor along its first dimension; at least one."""
    return [rows[start : start + size] for start in range(0, max(1, len(rows)), size)]


def _kind(model: Any) -> str:
    return "kl" if hasattr(model.config, "block_out_channels") else "tiny"


def _downsampling(model: Any) -> int:
    """Downsampling factor in each direction."""
    if _kind(model) == "tiny":
        return 2 ** (len(model.config.encoder_block_out_channels) - 1)
    return 2 ** (len(model.config.block_out_channels) - 1)


def is_path(source: str) -> bool:
    """Whether a source is a path; a hub id is NAME/NAME and not an existing folder."""
    return "://" in source or source.startswith(("/", ".", "~")) or Path(source).exists()


def _load_model(url: str, kind: str, dtype: torch.dtype, hub: bool) -> Any:
    # Download progress bars only fill the logs of actors.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from diffusers import AutoencoderKL, AutoencoderTiny

    model_class = AutoencoderTiny if kind == "tiny" else AutoencoderKL
    if not hub and not storage.exists(storage.join(url, "config.json")):
        raise UserError(
            f"autoencoder {url} does not exist; run `diffit fit autoencoder`, or set "
            "autoencoder.source to a folder in diffusers' format or a hub id"
        )
    # Explicit, because diffusers warns when it falls back to this.
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    try:
        if hub or storage.is_local(url):
            return model_class.from_pretrained(url, **options)
        with storage.local_folder(url) as folder:
            return model_class.from_pretrained(folder, **options)
    # For damaged files, diffusers raises nearly everything.
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"autoencoder.source {url} cannot be loaded: {reason}; set it to a folder in "
            f"diffusers' format or the hub id of an {model_class.__name__}"
        ) from error
