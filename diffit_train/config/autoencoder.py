"""Section `autoencoder`: what is between images and latents."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from diffit_train.config.base import Positive, PositiveInt, Section, Variants, without_credentials


class AutoencoderFit(Section):
    """How `diffit fit autoencoder` trains an AutoencoderKL."""

    steps: PositiveInt = 250
    """optimizer steps in total"""
    lr: Positive = 2e-3
    """learning rate"""
    kl_weight: Positive = 1e-4
    """weight of the KL term added to the MSE loss"""
    width: Annotated[int, Field(gt=0, multiple_of=8)] = 16
    """channels of the first level; the others have twice as many, and each halves the resolution"""

    def block_out_channels(self, downsample: int) -> tuple[int, ...]:
        """Channels of each level."""
        return (self.width, *[2 * self.width] * (downsample.bit_length() - 1))


class _Latents(Section):
    kind: str
    source: Annotated[str, Field(min_length=1)]
    """Hugging Face Hub id, or folder in diffusers format (`root:` means under ROOT)"""
    alias: str = ""
    """source by which latents and runs know the weights, where `source` is a copy of them, such as
    a mirror on S3; empty: `source`"""
    latent_channels: PositiveInt = 4
    """channels of a latent"""
    downsample: PositiveInt = 8
    """image side divided by latent side, in pixels"""
    scale: Positive | None = None
    """factor that latents are multiplied by; null: the autoencoder's own"""
    batch_size: PositiveInt = 32
    """images per encoding batch"""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """floating-point type of the autoencoder; tf32: fp32, but a GPU rounds the factors of products
    to TF32"""

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

    kind: Literal["kl"] = "kl"
    """kl: diffusers' AutoencoderKL"""
    fit: AutoencoderFit = AutoencoderFit()


class Tiny(_Latents):
    """An AutoencoderTiny."""

    kind: Literal["tiny"] = "tiny"
    """tiny: diffusers' AutoencoderTiny"""


class Pixels(Section):
    """No autoencoder."""

    source: ClassVar[str] = ""
    alias: ClassVar[str] = ""
    name: ClassVar[str] = ""
    latent_channels: ClassVar[int] = 3
    downsample: ClassVar[int] = 1
    batch_size: ClassVar[int] = 1
    precision: ClassVar[str] = "fp32"

    kind: Literal["identity"] = "identity"
    """identity: train on pixels"""

    def identity(self) -> dict[str, Any]:
        """The keys that determine the latents."""
        return self.model_dump()


# What is between images and latents.
Autoencoder = Annotated[Kl | Tiny | Pixels, Variants("kind", "kl")]
