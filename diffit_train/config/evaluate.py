"""Section `evaluate`: what is generated, and how it is measured."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from diffit_train.config.base import Fraction, Name, Positive, PositiveInt, Section

# Which samplers belong to which objective.
SAMPLERS = {
    "epsilon": ("ddpm", "ddim", "dpmpp_2m", "heun"),
    "flow": ("euler", "heun", "sde"),
}


# Options of `evaluate.sampler`, and the one sampler that each is of.
SAMPLER_OPTIONS = {
    "eta": "ddim",
    "spacing": "ddim",
    "diffusion": "sde",
    "last_step": "sde",
    "last_step_size": "sde",
}


# The published feature network, and where its weights come from.
INCEPTION = "inception"


PUBLISHED = "published"


# Statistics of the real images that are computed from data.source.
OWN = "own"


class Sampler(Section):
    """How latents are drawn."""

    name: Literal["ddpm", "ddim", "dpmpp_2m", "heun", "euler", "sde"] = Field(
        default="ddpm",
        description="for epsilon: ddpm, ddim, dpmpp_2m or heun; for flow: euler, heun or sde",
    )
    steps: PositiveInt = 250
    eta: Fraction = Field(default=0.0, description="ddim: share of fresh noise")
    spacing: Literal["even", "ddim"] = Field(
        default="even",
        description="ddim: which timesteps are visited; even: from first to last; ddim: every n-th "
        "from the first, as the DDIM paper has it (ADM's ddimN)",
    )
    diffusion: Literal["2sigma", "sigma"] = Field(
        default="2sigma",
        description="sde: squared coefficient w(t) of its noise, with sigma(t) = t; 2sigma: as in "
        "SiT's code, whose name for it is sigma; sigma: half of that",
    )
    last_step: Literal["mean", "euler"] = Field(
        default="mean",
        description="sde: its last step, without fresh noise; mean: along the SDE's drift (SiT's "
        "code); euler: along the velocity",
    )
    last_step_size: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.04, description="sde: time that the last step takes; the path takes 1"
    )

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        for key, owner in SAMPLER_OPTIONS.items():
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.name != owner and value != default:
                raise ValueError(
                    f"evaluate.sampler.{key} is {value!r}, but only sampler {owner!r} has this "
                    f"option; evaluate.sampler.name is {self.name!r}"
                )
        if self.name == "sde" and self.steps < 2:
            raise ValueError(
                f"evaluate.sampler.steps is {self.steps}, but sampler 'sde' takes at least 2"
            )
        return self


class Guidance(Section):
    """Classifier-free guidance."""

    kind: Literal["constant", "power_cosine", "interval", "none"] = "power_cosine"
    scale: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 4.4
    power: Positive = Field(default=4.0, description="exponent of power_cosine")
    low: Fraction = Field(default=0.0, description="interval: guided from this share of the time")
    high: Fraction = Field(default=1.0, description="interval: guided up to this share of the time")
    channels: PositiveInt | Literal["all"] = Field(
        default=3, description="leading latent channels that are guided; as published: 3"
    )
    skip_within: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        default=1e-4,
        description="the unconditional pass is left out where the weight is this close to 1",
    )

    @model_validator(mode="after")
    def _interval_is_one(self) -> Self:
        if self.low >= self.high:
            raise ValueError(
                f"evaluate.guidance.low is {self.low}, but must be below evaluate.guidance.high "
                f"({self.high})"
            )
        return self


class FeaturesFit(Section):
    """How `diffit features fit` trains a small classifier of one's own."""

    steps: PositiveInt = 400
    batch_size: PositiveInt = 64
    lr: Positive = 2e-3
    channels: tuple[PositiveInt, ...] = Field(
        default=(32, 64, 64), description="channels of each convolution; all but the first halve"
    )
    features: PositiveInt = Field(default=64, description="size of the feature vector")
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    seed: int = Field(default=0, ge=0)


class Features(Section):
    """The network whose features are compared."""

    name: Name = Field(
        description="the distance is called fd_NAME; inception, and only it, names the published "
        "network, whose distance is the FID"
    )
    kind: Literal["inception", "classifier"] = Field(
        default="classifier",
        description="Inception of 2015, or a classifier of one's own (`diffit features fit`)",
    )
    source: str = Field(
        default="published",
        description="folder written by `diffit features fit`, or Inception's weight file; "
        "published: the published one, fetched once. `root:` under ROOT",
    )
    fit: FeaturesFit = FeaturesFit()

    @model_validator(mode="after")
    def _names_are_honest(self) -> Self:
        if self.kind == "classifier" and self.name == INCEPTION:
            raise ValueError(
                "evaluate.features.name is 'inception', but that is the name of the published "
                "network; give a classifier of your own another name, or set "
                "evaluate.features.kind=inception"
            )
        if self.kind == "classifier" and self.source == PUBLISHED:
            raise ValueError(
                "evaluate.features.source is 'published', but a classifier is in a folder written "
                "by `diffit features fit`; name it, as root:features/own"
            )
        return self

    @property
    def published(self) -> bool:
        """Whether distances on these features may be called FID."""
        return self.kind == "inception" and self.name == INCEPTION


class Evaluate(Section):
    """What `diffit evaluate` generates and measures."""

    samples: Annotated[int, Field(gt=1)] = 50_000
    batch_size: PositiveInt = Field(
        default=64, description="images that pass through the networks at once"
    )
    weights: str = Field(
        default="ema",
        description="raw; the name of an average in train.ema; or sigma_rel:0.07 for one that is "
        "made of the run's snapshots (EDM2)",
    )
    precision: Literal["fp32", "bf16_autocast"] = "fp32"
    compile: bool = Field(default=False, description="compile the blocks by torch.compile")
    seed: int = Field(default=0, ge=0)
    sampler: Sampler = Sampler()
    guidance: Guidance = Guidance()
    labels: Literal["random", "balanced"] = Field(
        default="random",
        description="random: drawn uniformly, as in ADM, DiT and the published DiffiT; balanced: "
        "image i is of class i mod data.num_classes",
    )
    pixels: Literal["round", "truncate"] = Field(
        default="round",
        description="how decoded pixels become uint8; truncate: as ADM and the published DiffiT",
    )
    features: Features
    reference: str = Field(
        default=OWN,
        description="statistics of the real images: an .npz file of ADM or EDM, by path (`root:` "
        "under ROOT), s3:// or https:// URL, the last downloaded once under ROOT/references; own: "
        "computed from data.source",
    )
    num_neighbors: PositiveInt = Field(default=3, description="k of precision and recall")
    reference_images: PositiveInt = Field(
        default=10_000, description="most real images used for precision and recall"
    )
    grid_columns: PositiveInt = Field(default=10, description="images of a class in the grid")
    grid_rows: PositiveInt = Field(default=10, description="classes in the grid")

    @field_validator("reference")
    @classmethod
    def _empty_is_own(cls, reference: str) -> str:
        # Recipes that were stored before `own` had a name.
        return reference or OWN

    @property
    def reconstructed(self) -> float | None:
        """Width of the profile where the weights are made of snapshots; else None."""
        kind, colon, width = self.weights.partition(":")
        return float(width) if colon and kind == "sigma_rel" else None

    @field_validator("weights")
    @classmethod
    def _width_is_a_number(cls, weights: str) -> str:
        kind, colon, width = weights.partition(":")
        if colon and kind == "sigma_rel" and not re.fullmatch(r"0?\.\d+", width):
            raise ValueError(f"evaluate.weights is {weights!r}, but must be as sigma_rel:0.07")
        return weights
