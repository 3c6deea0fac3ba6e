"""Section `autoencoder`: the VAE between images and latents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffit_train.config.base import Positive, PositiveInt, Section


class AutoencoderFit(Section):
    """How `diffit autoencoder fit` trains an AutoencoderKL of one's own."""

    steps: PositiveInt = 250
    batch_size: PositiveInt = 64
    lr: Positive = 2e-3
    kl_weight: Positive = Field(default=1e-4, description="weight of the KL term beside the MSE")
    block_out_channels: tuple[PositiveInt, ...] = Field(
        default=(16, 32), description="channels of each level; all but the last halve the image"
    )
    layers_per_block: PositiveInt = 1
    norm_num_groups: PositiveInt = 8
    seed: int = Field(default=0, ge=0)


class Autoencoder(Section):
    """The VAE between images and latents."""

    kind: Literal["kl", "tiny", "identity"] = Field(
        default="kl",
        description="diffusers' AutoencoderKL or AutoencoderTiny; identity: pixels as latents",
    )
    source: str = Field(
        default="", description="hub id or folder in diffusers' format; `root:` under ROOT"
    )
    latent_channels: PositiveInt = 4
    downsample: PositiveInt = Field(default=8, description="pixels for one latent pixel")
    scale: Positive | None = Field(
        default=None, description="latents are multiplied by it; null: the autoencoder's own"
    )
    batch_size: PositiveInt = Field(default=32, description="images encoded at once")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fit: AutoencoderFit = AutoencoderFit()
