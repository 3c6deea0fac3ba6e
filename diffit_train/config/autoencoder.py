"""Section `autoencoder`: the VAE between images and latents."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from diffit_train.config.base import Positive, PositiveInt, Section, without_credentials


class AutoencoderFit(Section):
    """How `diffit fit autoencoder` trains your own AutoencoderKL."""

    steps: PositiveInt = Field(default=250, description="optimizer steps in total")
    batch_size: PositiveInt = Field(default=64, description="images per step")
    lr: Positive = Field(default=2e-3, description="learning rate")
    kl_weight: Positive = Field(
        default=1e-4, description="weight of the KL term added to the MSE loss"
    )
    block_out_channels: tuple[PositiveInt, ...] = Field(
        default=(16, 32),
        description="channels per level; each but the last halves the resolution, so that there "
        "is one more than autoencoder.downsample halves. Follows from it where it is not given",
    )
    layers_per_block: PositiveInt = Field(default=1, description="residual layers per level")
    norm_num_groups: PositiveInt = Field(
        default=8, description="groups of each GroupNorm; must divide every block_out_channels"
    )


class Autoencoder(Section):
    """The VAE between images and latents."""

    kind: Literal["kl", "tiny", "identity"] = Field(
        default="kl",
        description="kl or tiny: diffusers' AutoencoderKL or AutoencoderTiny; identity: train on "
        "pixels",
    )
    source: str = Field(
        default="",
        description="Hugging Face Hub id, or folder in diffusers format (`root:` means under ROOT)",
    )
    alias: str = Field(
        default="",
        description="source by which latents and runs know the weights, where `source` is a copy "
        "of them, such as a mirror on S3; empty: `source`",
    )
    latent_channels: PositiveInt = Field(default=4, description="channels of a latent")
    downsample: PositiveInt = Field(
        default=8,
        description="image side divided by latent side, in pixels. Follows from "
        "autoencoder.fit.block_out_channels where only that is given",
    )
    scale: Positive | None = Field(
        default=None,
        description="factor that latents are multiplied by; null: the autoencoder's own",
    )
    batch_size: PositiveInt = Field(default=32, description="images per encoding batch")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        default="fp32",
        description="floating-point type of the autoencoder; tf32: fp32, but a GPU rounds the "
        "factors of products to TF32",
    )
    fit: AutoencoderFit = AutoencoderFit()

    @model_validator(mode="before")
    @classmethod
    def _derive_levels(cls, values: Any) -> Any:
        """Downsampling by 2 ** (levels - 1), whichever of the two is given."""
        fit = values.get("fit", {}) if isinstance(values, dict) else None
        if not isinstance(fit, dict):
            return values
        channels, factor = fit.get("block_out_channels"), values.get("downsample")
        if isinstance(channels, list | tuple) and channels and factor is None:
            return {**values, "downsample": 2 ** (len(channels) - 1)}
        if channels is None and isinstance(factor, int) and factor > 0 and factor.bit_count() == 1:
            levels = (16, *[32] * (factor.bit_length() - 1))
            return {**values, "fit": {**fit, "block_out_channels": levels}}
        return values

    _sources = field_validator("source", "alias")(without_credentials)

    @property
    def name(self) -> str:
        """The source by which the weights are known."""
        return self.alias or self.source

    def identity(self) -> dict[str, Any]:
        """The keys that determine the latents.

        An fp32 autoencoder ran in TF32 on a GPU before there was a key for it: the hash is the
        same for both.
        """
        keys = self.model_dump(mode="json", exclude={"fit", "alias"})
        keys["source"] = self.name
        if self.precision == "tf32":
            keys["precision"] = "fp32"
        return keys
