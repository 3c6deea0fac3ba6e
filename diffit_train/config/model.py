"""Section `model`: the transformer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from diffit_train.config.base import Positive, PositiveInt, Section
from diffit_train.config.plugins import Plugged
from diffit_train.config.presets import PRESETS

# Architectures on pixels, and on latents.
UNET_ARCHITECTURES = ("ddpmpp", "ncsnpp")
IMAGE_ARCHITECTURES = ("image_diffit", *UNET_ARCHITECTURES)
LATENT_ARCHITECTURES = ("diffit", "dit", "dit_tmsa")
ARCHITECTURES = Plugged(
    "model.architecture", "diffit_train.models", (*LATENT_ARCHITECTURES, *IMAGE_ARCHITECTURES)
)

# Keys of `model` that only latent architectures have.
LATENT_KEYS = (
    "preset",
    "patch_size",
    "hidden_size",
    "depth",
    "num_heads",
    "position_side",
    "label_init_std",
)


# Keys that a network of another package does not have.
_OURS_ONLY = (*LATENT_KEYS, "mlp_ratio")


class ImageModel(Section):
    """The image-space DiffiT; stages from the finest resolution to the coarsest."""

    channels: tuple[PositiveInt, ...] = Field(
        default=(128, 256, 256),
        description="channels of each stage; each stage but the first halves the resolution",
    )
    blocks: tuple[PositiveInt, ...] = Field(
        default=(4, 4, 4), description="residual blocks of each stage, in encoder and decoder each"
    )
    window: PositiveInt = Field(
        default=4, description="side of the windows of attention, in pixels of the stage"
    )
    head_size: PositiveInt = Field(default=32, description="channels of an attention head")
    time_size: PositiveInt = Field(default=512, description="size of the time token")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="probability of dropping an activation in training"
    )
    resample: Literal["convolution", "bilinear"] = Field(
        default="convolution", description="how features change their resolution"
    )
    time: Literal["tmsa", "separate", "bias", "mlp"] = Field(
        default="tmsa",
        description="what the time token enters; tmsa: queries, keys and values; separate: an "
        "attention of its own; bias: the relative-position bias; mlp: the MLP",
    )
    time_embedding: Literal["positional", "fourier"] = Field(
        default="positional",
        description="features of the noise level, from which the time token is computed",
    )
    encoder: Literal["diffit", "multi_resolution", "vit"] = Field(
        default="diffit",
        description="diffit: residual blocks with TMSA; multi_resolution: plain transformer "
        "blocks; vit: plain transformer blocks at the coarsest resolution only",
    )
    decoder: Literal["diffit", "multi_resolution", "setr_mla"] = Field(
        default="diffit",
        description="diffit and multi_resolution: as the encoder, with skip connections; setr_mla: "
        "the encoder's features, upsampled and fused by convolutions",
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if len(self.blocks) != len(self.channels):
            raise ValueError(
                f"model.image.blocks has {len(self.blocks)} stages, but model.image.channels has "
                f"{len(self.channels)}"
            )
        for width in self.channels:
            if width % self.head_size:
                raise ValueError(
                    f"model.image.head_size is {self.head_size}, but must divide every "
                    f"model.image.channels ({width})"
                )
        if self.encoder == "vit" and self.decoder != "setr_mla":
            raise ValueError(
                f"model.image.decoder is {self.decoder!r}, but must be 'setr_mla' when "
                "model.image.encoder is 'vit', which has one resolution only"
            )
        without = [part for part in (self.encoder, self.decoder) if part != "diffit"]
        if self.time != "tmsa" and len(without) == 2:
            raise ValueError(
                f"model.image.time is {self.time!r}, but neither model.image.encoder nor "
                "model.image.decoder is 'diffit', whose blocks it changes"
            )
        return self


class UNetModel(Section):
    """DDPM++ and NCSN++, in the shape that EDM trained on CIFAR-10."""

    channels: Annotated[int, Field(gt=0, multiple_of=4)] = Field(
        default=128, description="base of the channels of all stages"
    )
    multipliers: tuple[PositiveInt, ...] = Field(
        default=(2, 2, 2),
        description="channels of each stage, in multiples of `channels`; each stage but the first "
        "halves the resolution",
    )
    blocks: PositiveInt = Field(
        default=4, description="residual blocks of each stage; one more in the decoder"
    )
    attention_resolutions: tuple[PositiveInt, ...] = Field(
        default=(16,),
        description="sides of the images at which there is attention; always at the coarsest",
    )
    attention: Literal["plain", "tmsa"] = Field(
        default="plain", description="plain: self-attention; tmsa: TMSA instead"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="probability of dropping an activation in training"
    )


class Model(Section):
    """The network. Other keys override what `preset` sets."""

    preset: str | None = Field(
        default=None, description=f"named size: {', '.join(PRESETS)}; null: the keys below"
    )
    architecture: Annotated[str, ARCHITECTURES] = Field(
        default="diffit",
        description="diffit: DiffiT; dit: DiT with adaLN-Zero; dit_tmsa: DiT with TMSA instead of "
        "adaLN-Zero; image_diffit: the U-shaped DiffiT on pixels, with the keys of model.image; "
        "ddpmpp, ncsnpp: convolutional U-Nets on pixels, with the keys of model.unet; or a custom "
        "class, with the arguments in model.options",
    )
    options: dict[str, Any] = Field(default={}, description="arguments of a custom architecture")
    patch_size: PositiveInt = Field(
        default=2, description="side of a patch, in latent pixels; a patch is one token"
    )
    hidden_size: Annotated[int, Field(gt=0, multiple_of=4)] = Field(
        default=1152, description="width of a token; a multiple of 4 and of num_heads"
    )
    depth: PositiveInt = Field(default=28, description="number of transformer blocks")
    num_heads: PositiveInt = Field(default=16, description="attention heads per block")
    mlp_ratio: Positive = Field(
        default=4.0, description="hidden width of the MLP divided by hidden_size"
    )
    conditional: bool = Field(
        default=True, description="whether the model is conditioned on the label"
    )
    position_side: PositiveInt | None = Field(
        default=None,
        description="side, in tokens, of the grid that the fixed position embeddings span; null: "
        "the model's own. A model started from one at another resolution keeps that one's",
    )
    label_init_std: Positive = Field(
        default=0.02, description="standard deviation of the initial label embeddings"
    )
    attention: Literal["auto", "reference", "sdpa", "chunked", "flex"] = Field(
        default="auto", description="attention kernel; auto: sdpa on CUDA, chunked elsewhere"
    )

    image: ImageModel = ImageModel()
    unet: UNetModel = UNetModel()

    @model_validator(mode="after")
    def _keys_belong(self) -> Self:
        fields = type(self).model_fields
        refused: tuple[str, ...] = LATENT_KEYS if self.on_pixels else ()
        if self.plugged:
            refused = _OURS_ONLY
        elif self.options:
            raise ValueError(
                f"model.options has {', '.join(self.options)}, but model.architecture is "
                f"{self.architecture!r}; only a custom architecture has options"
            )
        instead = "model.options" if self.plugged else "the keys of model.image or model.unet"
        for key in refused:
            value, default = getattr(self, key), fields[key].default
            if value != default:
                raise ValueError(
                    f"model.{key} is {value!r}, but model.architecture is "
                    f"{self.architecture!r}; set {instead} instead"
                )
        for key, section, owners in (
            ("image", self.image, ("image_diffit",)),
            ("unet", self.unet, UNET_ARCHITECTURES),
        ):
            changed = section.model_dump(exclude_defaults=True)
            if changed and self.architecture not in owners:
                raise ValueError(
                    f"model.{key} has {', '.join(changed)}, but model.architecture is "
                    f"{self.architecture!r}; only {', '.join(owners)} has these parts"
                )
        return self

    @property
    def plugged(self) -> bool:
        """Whether the network is another package's."""
        return ARCHITECTURES.is_plugged(self.architecture)

    @property
    def on_pixels(self) -> bool:
        """Whether the network is one of ours that works on pixels instead of latents."""
        return self.architecture in IMAGE_ARCHITECTURES

    @property
    def dropout(self) -> float:
        """Probability of dropping an activation."""
        if not self.on_pixels:
            return 0.0
        return self.image.dropout if self.architecture == "image_diffit" else self.unet.dropout

    def unused_keys(self) -> set[str]:
        """Keys that this architecture does not have."""
        if self.plugged:
            return {*_OURS_ONLY, "image", "unet"}
        if not self.on_pixels:
            return {"image", "unet", "options"}
        other = "unet" if self.architecture == "image_diffit" else "image"
        return {*LATENT_KEYS, other, "options"}

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(name, str):
            return values
        if name not in PRESETS:
            raise ValueError(f"model.preset is {name!r}, but must be one of: {', '.join(PRESETS)}")
        return {**PRESETS[name], **values}
