"""Section `model`: the network."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from diffit_train.config.base import Positive, PositiveInt, Section, Variants
from diffit_train.config.plugins import Plugged
from diffit_train.config.presets import PRESETS

ARCHITECTURES = Plugged(
    "model.architecture",
    "diffit_train.models",
    ("diffit", "dit", "dit_tmsa", "image_diffit", "ddpmpp", "ncsnpp"),
)

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Model(Section):
    # Whether it is one of ours that works on pixels instead of latents.
    on_pixels: ClassVar[bool] = False

    architecture: str
    conditional: bool = True
    """whether the model is conditioned on the label"""
    attention: Literal["auto", "reference", "sdpa", "chunked", "flex"] = "auto"
    """attention kernel; auto: sdpa on CUDA, chunked elsewhere"""


class LatentModel(_Model):
    """A transformer on latents. Other keys override what `preset` sets."""

    dropout: ClassVar[float] = 0.0

    architecture: Literal["diffit", "dit", "dit_tmsa"] = "diffit"
    """diffit: DiffiT; dit: DiT with adaLN-Zero; dit_tmsa: DiT with TMSA instead of adaLN-Zero"""
    preset: str | None = None
    """named architecture and sizes, which other keys change: diffit_s, diffit_b, diffit_l,
    diffit_xl, diffit_xl_depth30; dit_s to dit_xl; dit_tmsa_s to dit_tmsa_xl"""
    patch_size: PositiveInt = 2
    """side of a patch, in latent pixels; a patch is one token"""
    hidden_size: Annotated[int, Field(gt=0, multiple_of=4)] = 1152
    """width of a token; a multiple of 4 and of num_heads"""
    depth: PositiveInt = 28
    """number of transformer blocks"""
    num_heads: PositiveInt = 16
    """attention heads per block"""
    mlp_ratio: Positive = 4.0
    """hidden width of the MLP divided by that of its input"""
    position_side: PositiveInt | None = None
    """side, in tokens, of the grid that the fixed position embeddings span; null: the model's own.
    A model started from one at another resolution keeps that one's"""
    label_init_std: Positive = 0.02
    """standard deviation of the initial label embeddings"""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(name, str):
            return values
        if name not in PRESETS:
            raise ValueError(f"model.preset is {name!r}, but must be one of: {', '.join(PRESETS)}")
        return {**PRESETS[name], **values}


class ImageModel(_Model):
    """The image-space DiffiT; stages from the finest resolution to the coarsest."""

    on_pixels: ClassVar[bool] = True

    architecture: Literal["image_diffit"] = "image_diffit"
    """image_diffit: the U-shaped DiffiT on pixels"""
    channels: tuple[PositiveInt, ...] = (128, 256, 256)
    """channels of each stage; each stage but the first halves the resolution"""
    blocks: tuple[PositiveInt, ...] = (4, 4, 4)
    """residual blocks of each stage, in encoder and decoder each"""
    window: PositiveInt = 4
    """side of the windows of attention, in pixels of the stage"""
    mlp_ratio: Positive = 4.0
    """hidden width of the MLP divided by that of its input"""
    head_size: PositiveInt = 32
    """channels of an attention head"""
    time_size: PositiveInt = 512
    """size of the time token"""
    dropout: Dropout = 0.0
    """probability of dropping an activation in training"""
    resample: Literal["convolution", "bilinear"] = "convolution"
    """how features change their resolution"""
    time: Literal["tmsa", "separate", "bias", "mlp"] = "tmsa"
    """what the time token enters; tmsa: queries, keys and values; separate: an attention of its
    own; bias: the relative-position bias; mlp: the MLP"""
    time_embedding: Literal["positional", "fourier"] = "positional"
    """features of the noise level, from which the time token is computed"""
    encoder: Literal["diffit", "multi_resolution", "vit"] = "diffit"
    """diffit: residual blocks with TMSA; multi_resolution: plain transformer blocks; vit: plain
    transformer blocks at the coarsest resolution only"""
    decoder: Literal["diffit", "multi_resolution", "setr_mla"] = "diffit"
    """diffit and multi_resolution: as the encoder, with skip connections; setr_mla: the encoder's
    features, upsampled and fused by convolutions"""

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if len(self.blocks) != len(self.channels):
            raise ValueError(
                f"model.blocks has {len(self.blocks)} stages, but model.channels has "
                f"{len(self.channels)}"
            )
        for width in self.channels:
            if width % self.head_size:
                raise ValueError(
                    f"model.head_size is {self.head_size}, but must divide every "
                    f"model.channels ({width})"
                )
        if self.encoder == "vit" and self.decoder != "setr_mla":
            raise ValueError(
                f"model.decoder is {self.decoder!r}, but must be 'setr_mla' when "
                "model.encoder is 'vit', which has one resolution only"
            )
        without = [part for part in (self.encoder, self.decoder) if part != "diffit"]
        if self.time != "tmsa" and len(without) == 2:
            raise ValueError(
                f"model.time is {self.time!r}, but neither model.encoder nor "
                "model.decoder is 'diffit', whose blocks it changes"
            )
        return self


class UNetModel(_Model):
    """DDPM++ and NCSN++, in the shape that EDM trained on CIFAR-10."""

    on_pixels: ClassVar[bool] = True

    architecture: Literal["ddpmpp", "ncsnpp"] = "ddpmpp"
    """ddpmpp, ncsnpp: convolutional U-Nets on pixels"""
    channels: Annotated[int, Field(gt=0, multiple_of=4)] = 128
    """base of the channels of all stages"""
    multipliers: tuple[PositiveInt, ...] = (2, 2, 2)
    """channels of each stage, in multiples of `channels`; each stage but the first halves the
    resolution"""
    blocks: PositiveInt = 4
    """residual blocks of each stage; one more in the decoder"""
    attention_resolutions: tuple[PositiveInt, ...] = (16,)
    """sides of the images at which there is attention; always at the coarsest"""
    tmsa: bool = False
    """TMSA instead of self-attention"""
    dropout: Dropout = 0.0
    """probability of dropping an activation in training"""


class CustomModel(_Model):
    """A custom class."""

    dropout: ClassVar[float] = 0.0

    architecture: Annotated[str, ARCHITECTURES]
    """or a custom class"""
    options: dict[str, Any] = {}
    """arguments of a custom architecture"""


# The network.
Model = Annotated[
    LatentModel | ImageModel | UNetModel | CustomModel, Variants("architecture", "diffit")
]
