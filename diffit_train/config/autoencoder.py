"""Section `autoencoder`: what is between images and latents."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from diffit_train.config.base import Positive, PositiveInt, Section, Variants, without_credentials


class AutoencoderFit(Section):
    """How `diffit fit autoencoder` trains an AutoencoderKL."""

    steps: PositiveInt = Field(default=250, description="optimizer steps in total")
    batch_size: PositiveInt = Field(default=64, description="images per step")
    lr: Positive = Field(default=2e-3, description="learning rate")
    kl_weight: Positive = Field(
        default=1e-4, description="weight of the KL term added to the MSE loss"
    )
    width: Annotated[int, Field(gt=0, multiple_of=8)] = Field(
        default=16,
        description="channels of the first level; the others have twice as many, and each halves "
        "the resolution",
    )

    def block_out_channels(self, downsample: int) -> tuple[int, ...]:
        """Channels of each level."""
        return (self.width, *[2 * self.width] * (downsample.bit_length() - 1))


class _Latents(Section):
    kind: str
    source: str = Field(
        min_length=1,
        description="Hugging Face Hub id, or folder in diffusers format (`root:` means under ROOT)",
    )
    alias: str = Field(
        default="",
        description="source by which latents and runs know the weights, where `source` is a copy "
        "of them, such as a mirror on S3; empty: `source`",
    )
    latent_channels: PositiveInt = Field(default=4, description="channels of a latent")
    downsample: PositiveInt = Field(
        default=8, description="image side divided by latent side, in pixels"
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

    _sources = field_validator("source", "alias")(without_credentials)

    @property
    def name(self) -> str:
        """The source by which the weights are known."""
        return self.alias or self.source

    def identity(self) -> dict[str, Any]:
        """The keys that determine the latents; fp32 and tf32 count as the same."""
        keys = self.model_dump(mode="json", exclude={"fit", "alias"})
        precision = "fp32" if self.precision == "tf32" else self.precision
        return {**keys, "source": self.name, "precision": precision}


class Kl(_Latents):
    """An AutoencoderKL."""

    kind: Literal["kl"] = Field(default="kl", description="kl: diffusers' AutoencoderKL")
    fit: AutoencoderFit = AutoencoderFit()


class Tiny(_Latents):
    """An AutoencoderTiny."""

    kind: Literal["tiny"] = Field(default="tiny", description="tiny: diffusers' AutoencoderTiny")


class Pixels(Section):
    """No autoencoder."""

    source: ClassVar[str] = ""
    alias: ClassVar[str] = ""
    name: ClassVar[str] = ""
    latent_channels: ClassVar[int] = 3
    downsample: ClassVar[int] = 1
    batch_size: ClassVar[int] = 1
    precision: ClassVar[str] = "fp32"

    kind: Literal["identity"] = Field(default="identity", description="identity: train on pixels")

    def identity(self) -> dict[str, Any]:
        """The keys that determine the latents."""
        return self.model_dump()


# What is between images and latents.
Autoencoder = Annotated[Kl | Tiny | Pixels, Variants("kind", "kl")]
