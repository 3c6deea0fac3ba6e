"""Section `evaluate`: how images are generated and measured."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from diffit_train.config.base import (
    Fraction,
    Name,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    Variants,
)
from diffit_train.config.plugins import Plugged

# Samplers of each objective; of a custom one `custom`.
SAMPLERS = {
    "epsilon": ("ddpm", "ddim", "dpmpp_2m", "heun"),
    "flow": ("euler", "heun", "sde"),
    **dict.fromkeys(("edm", "vp", "ve"), ("edm",)),
}

FEATURES = Plugged("evaluate.features.kind", "diffit_train.features", ("inception", "classifier"))

# The published feature network, and the source of its weights.
INCEPTION = "inception"
PUBLISHED = "published"

# Keys that change neither the images nor the metrics.
FREE_KEYS = ("compile", "keep_images")

# Reference statistics computed from data.source.
DATASET = "dataset"


class _Sampler(Section):
    name: str
    steps: PositiveInt = 250
    """sampling steps"""


class PlainSampler(_Sampler):
    """A sampler without options."""

    name: Literal["ddpm", "dpmpp_2m", "heun", "euler", "custom"] = "ddpm"
    """ddpm, dpmpp_2m: for objective epsilon; heun: for epsilon and flow; euler: for flow; custom:
    that of a custom objective"""


class Ddim(_Sampler):
    """DDIM."""

    name: Literal["ddim"] = "ddim"
    """ddim: for epsilon"""
    eta: Fraction = 0.0
    """noise added at each step; 0: none, 1: as much as DDPM"""
    spacing: Literal["even", "ddim"] = "even"
    """timesteps visited; even: evenly spaced, first and last included; ddim: every n-th from the
    first, as in the DDIM paper (ADM's ddimN)"""


class Sde(_Sampler):
    """The flow's SDE."""

    name: Literal["sde"] = "sde"
    """sde: for flow"""
    steps: Annotated[int, Field(ge=2)] = 250
    """sampling steps"""
    diffusion: Literal["2sigma", "sigma"] = "2sigma"
    """squared diffusion coefficient w(t), where sigma(t) = t; 2sigma: 2 t, as in SiT's code (which
    calls it sigma); sigma: t"""
    last_step: Literal["mean", "euler"] = "mean"
    """last step, taken without noise; mean: along the SDE's drift (SiT's code); euler: along the
    velocity"""
    last_step_size: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.04
    """length of the last step, where the whole path is 1"""


class EdmSampler(_Sampler):
    """EDM's sampler (Karras et al. 2022, algorithm 2 and table 1)."""

    name: Literal["edm"] = "edm"
    """edm: EDM's, by Heun's method, for edm, vp and ve"""
    steps: Annotated[int, Field(ge=2)] = 18
    """sampling steps"""
    sigma_min: Positive = 0.002
    """lowest noise level above 0"""
    sigma_max: Positive = 80.0
    """highest noise level"""
    rho: Positive = 7.0
    """exponent; larger values take shorter steps at low noise"""
    churn: NonNegative = 0.0
    """S_churn, noise added in all steps together; 0: deterministic"""
    churn_range: tuple[NonNegative, Positive | None] = (0.0, None)
    """S_min and S_max, lowest and highest noise level at which noise is added; null: any"""
    churn_noise: Positive = 1.0
    """S_noise, standard deviation of the noise that is added"""

    @model_validator(mode="after")
    def _sigmas_ascend(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"evaluate.sampler.sigma_min is {self.sigma_min}, but must be less than "
                f"evaluate.sampler.sigma_max ({self.sigma_max})"
            )
        return self


# How latents are sampled.
Sampler = Annotated[PlainSampler | Ddim | Sde | EdmSampler, Variants("name", "ddpm")]


class NoGuidance(Section):
    """No guidance."""

    kind: Literal["none"] = "none"
    """none: no guidance"""

    @property
    def title(self) -> str:
        """For messages and names."""
        return self.kind


class _Guidance(Section):
    kind: str
    scale: NonNegative = 4.4
    """guidance scale; 1: no guidance"""
    channels: PositiveInt | Literal["all"] = 3
    """leading latent channels that are guided; published DiffiT: 3"""
    skip_within: NonNegative = 1e-4
    """skip the unconditional forward pass where the guidance weight is this close to 1"""

    @property
    def title(self) -> str:
        """For messages and names."""
        return f"{self.kind} {self.scale:g}"


class ConstantGuidance(_Guidance):
    """The same weight at all noise levels."""

    kind: Literal["constant"] = "constant"
    """constant: scale at all noise levels"""


class PowerCosineGuidance(_Guidance):
    """A weight that rises as the noise falls."""

    kind: Literal["power_cosine"] = "power_cosine"
    """power_cosine: from 1 at t = T to scale at t = 0"""
    power: Positive = 4.0
    """exponent"""


class IntervalGuidance(_Guidance):
    """A weight on an interval of noise levels."""

    kind: Literal["interval"] = "interval"
    """interval: scale between low and high, else 1"""
    low: Fraction = 0.0
    """lowest guided noise level, 0 to 1"""
    high: Fraction = 1.0
    """highest guided noise level, 0 to 1"""

    @model_validator(mode="after")
    def _levels_ascend(self) -> Self:
        if self.low >= self.high:
            raise ValueError(
                f"evaluate.guidance.low is {self.low}, but must be less than "
                f"evaluate.guidance.high ({self.high})"
            )
        return self


# Classifier-free guidance.
Guidance = Annotated[
    NoGuidance | ConstantGuidance | PowerCosineGuidance | IntervalGuidance,
    Variants("kind", "power_cosine"),
]


class FeaturesFit(Section):
    """How `diffit fit features` trains a small classifier."""

    steps: PositiveInt = 400
    """optimizer steps in total"""
    lr: Positive = 2e-3
    """learning rate"""
    channels: tuple[PositiveInt, ...] = (32, 64, 64)
    """channels of each convolution; each but the first halves the resolution"""
    features: PositiveInt = 64
    """size of the feature vector"""


def _not_reserved(name: str) -> str:
    if name == INCEPTION:
        raise ValueError(
            "this name is reserved for the published network; choose another name, or set "
            "evaluate.features.kind=inception"
        )
    return name


class _Features(Section):
    kind: str
    name: Annotated[Name, AfterValidator(_not_reserved)]
    """the Frechet distance is called fd_NAME"""

    @property
    def published(self) -> bool:
        """Whether distances on these features may be called FID."""
        return False


class Inception(_Features):
    """Inception-2015."""

    kind: Literal["inception"] = "inception"
    """inception: Inception-2015"""
    name: Name = INCEPTION
    """inception: the published network, whose Frechet distance is the FID; with other weights
    fd_NAME"""
    source: str = PUBLISHED
    """weight file (`root:` means under ROOT); published: download the published weights once"""

    @property
    def published(self) -> bool:
        """Whether distances on these features may be called FID."""
        return self.name == INCEPTION


class ClassifierFeatures(_Features):
    """A small classifier of the images' own classes."""

    kind: Literal["classifier"] = "classifier"
    """classifier: one that `diffit fit features` trained"""
    source: str
    """folder written by `diffit fit features`, such as root:features/mine"""
    fit: FeaturesFit = FeaturesFit()


class CustomFeatures(_Features):
    """A custom class."""

    kind: Annotated[str, FEATURES]
    """or a custom class"""
    source: str | None = None
    """its weight file (`root:` means under ROOT); null: it has none"""
    options: dict[str, Any] = {}
    """arguments of a custom network"""


# The feature network that metrics are computed with.
Features = Annotated[
    Inception | ClassifierFeatures | CustomFeatures, Variants("kind", "classifier")
]


class Evaluate(Section):
    """What `diffit evaluate` generates and measures."""

    samples: Annotated[int, Field(gt=1)] = 50_000
    """images generated per evaluation"""
    batch_size: PositiveInt = 64
    """images per batch of generation and feature extraction"""
    weights: str = "ema"
    """raw; the name of an EMA in train.ema; or, for example, sigma_rel:0.07 for an EMA
    reconstructed from the run's snapshots (EDM2)"""
    precision: Literal["fp32", "tf32", "bf16_autocast"] = "fp32"
    """of the model, whose weights are fp32; fp32: full float32; tf32: float32 whose matrix products
    and convolutions run on a GPU's tensor cores; bf16_autocast: bf16 matrix products. Features are
    always measured in full float32"""
    compile: bool = False
    """compile the transformer blocks with torch.compile"""
    seed: NonNegativeInt = 0
    """seed of labels and noise; image i depends on (seed, i) only"""
    sampler: Sampler = PlainSampler()
    """How latents are sampled."""
    guidance: Guidance = PowerCosineGuidance()
    """Classifier-free guidance."""
    labels: Literal["random", "balanced"] = "random"
    """random: uniformly random, as in ADM, DiT and the published DiffiT; balanced: class i mod
    data.num_classes for image i"""
    pixels: Literal["round", "truncate"] = "round"
    """conversion of decoded pixels to uint8; truncate: as in ADM and the published DiffiT"""
    features: Features
    """The feature network that metrics are computed with."""
    reference: str = DATASET
    """statistics of the real images; dataset: computed from data.source; else an .npz file in ADM's
    or EDM's format: a path (`root:` means under ROOT), an s3:// URL, or an https:// URL, downloaded
    once into ROOT/references"""
    reference_images: PositiveInt = 10_000
    """maximum number of real images used for precision and recall"""
    keep_images: Literal["grid", "all"] = "grid"
    """images that are kept as files; grid: those of grid.png, as 50,000 of 256x256 are 9.8 GB.
    `diffit evaluate --npz` keeps all in samples.npz"""
    grid: tuple[PositiveInt, PositiveInt] = (10, 10)
    """classes, and images of each, in grid.png"""

    @property
    def reconstructed(self) -> float | None:
        """sigma_rel of the EMA to reconstruct from snapshots; None if none is asked for."""
        kind, colon, width = self.weights.partition(":")
        return float(width) if colon and kind == "sigma_rel" else None

    @field_validator("weights")
    @classmethod
    def _width_is_a_number(cls, weights: str) -> str:
        kind, colon, width = weights.partition(":")
        if colon and kind == "sigma_rel" and not re.fullmatch(r"0?\.\d+", width):
            raise ValueError(f"evaluate.weights is {weights!r}, but must look like sigma_rel:0.07")
        return weights
