"""The autoencoder: diffusers' AutoencoderKL or AutoencoderTiny, or the identity; with a scale.

Shapes: B images, R x R pixels, C latent channels, h x w latent pixels.

It works on slices of a batch whose activations fit a budget: a decode of 64 images at 512x512 by
Stable Diffusion's autoencoder would hold 48 GiB in fp32. Group norms are over one image, so slices
give the results of the whole batch, up to the rounding of the kernel that a library chooses for a
size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.autoencoder_source import autoencoder_url, is_hub_id, require_autoencoder
from diffit_train.data.manifest import MANIFEST, latents_url, load_manifest
from diffit_train.errors import UserError, first_line
from diffit_train.models.precision import cudnn_benchmark, tf32

T = TypeVar("T", np.ndarray, Tensor)
Part = Literal["encode", "decode"]
# diffusers' bounds on the posterior's log-variance.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
# Tensors that AutoencoderKL holds at once, counted on it: in a residual layer of as many output as
# input channels; of other input channels, those that it reads; in the attention between encoder and
# decoder levels.
KL_RESIDUAL, KL_READ, KL_ATTENTION = 5, 3, 9
TINY_TENSORS = 3.2
CPU_BUDGET = 2 * storage.GIB
# Of a GPU's memory, and of what is free of it: it also holds the model that generates.
GPU_SHARE, FREE_SHARE = 1 / 8, 1 / 2
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

    `model` is None for the identity, whose latents are pixels in [-1, 1].

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


def activation_values(config: Any, kind: str, part: Part) -> float:
    """Most values that the autoencoder holds at once, per pixel of the image.

    Args:
        config: diffusers' configuration of the model.
        kind: `autoencoder.kind`.
    """
    if kind == "tiny":
        channels: Sequence[int] = getattr(config, f"{part}r_block_out_channels")
        return TINY_TENSORS * max(channels)
    channels = config.block_out_channels
    # A level reads what the next higher, or in decoding the upsampled lower one made.
    last = len(channels) - 1
    step = -1 if part == "encode" else 1
    reads = [channels[min(last, max(0, level + step))] for level in range(last + 1)]
    values = [
        max(KL_RESIDUAL * own, KL_READ * read) / 4**level
        for level, (own, read) in enumerate(zip(channels, reads, strict=True))
    ]
    return float(max(*values, KL_ATTENTION * channels[-1] / 4**last))


def budget_bytes(device: torch.device) -> int:
    """Bytes of activations at once.

    On a GPU a share of its memory, so that shards are encoded in the same slices each time, or less
    if little of it is free.
    """
    if device.type != "cuda":
        return CPU_BUDGET
    free, total = torch.cuda.mem_get_info(device)
    # What the allocator keeps for reuse is also free.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(GPU_SHARE * total, FREE_SHARE * free))


def slice_size(images: int, bytes_each: float, budget: int) -> int:
    """Images at once: all, or the largest power of two that fits; at least one."""
    fit = max(1, int(budget // bytes_each)) if bytes_each else images
    return max(1, images) if fit >= images else 1 << (fit.bit_length() - 1)


def load_autoencoder(recipe: Recipe, device: torch.device) -> LoadedAutoencoder:
    """The recipe's autoencoder, frozen.

    Raises:
        UserError: it is not available, or its latent shape is not the recipe's.
    """
    url, section = autoencoder_url(recipe), recipe.autoencoder
    if section.kind == "identity":
        return LoadedAutoencoder(None, "identity", 1.0, device, torch.float32)
    dtype = _DTYPES[section.precision]
    model = _load_model(recipe, url, dtype)
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
    # Layout of the convolutions' weights, which their results take over. On a CPU channels last is
    # faster. On CUDA nothing has been measured, and group norm would copy each tensor back.
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    model = model.to(device, memory_format=layout).eval().requires_grad_(False)
    rounded = section.precision == "tf32"
    loaded = LoadedAutoencoder(model, section.name, scale, device, dtype, rounded)
    latents = latents_url(recipe)
    if (
        section.alias
        and storage.exists(storage.join(latents, MANIFEST))
        and loaded.weight_hash() != load_manifest(latents).autoencoder_sha256
    ):
        raise UserError(
            f"autoencoder.alias is {loaded.id}, but the weights at {url} are not those that "
            f"{latents} was encoded with; set autoencoder.source to a copy of them"
        )
    return loaded


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


def _load_model(recipe: Recipe, url: str, dtype: torch.dtype) -> Any:
    # Download progress bars only fill the logs of actors.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from diffusers import AutoencoderKL, AutoencoderTiny

    model_class = AutoencoderTiny if recipe.autoencoder.kind == "tiny" else AutoencoderKL
    hub = is_hub_id(recipe.autoencoder.source)
    if not hub:
        require_autoencoder(recipe)
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
