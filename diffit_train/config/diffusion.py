"""Section `diffusion`: the forward process and the prediction target."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from diffit_train.config.base import Positive, Section, Variants
from diffit_train.config.plugins import Plugged

OBJECTIVES = Plugged(
    "diffusion.objective", "diffit_train.objectives", ("epsilon", "flow", "edm", "vp", "ve")
)

Timesteps = Annotated[int, Field(gt=1)]
Beta = Annotated[float, Field(gt=0.0, lt=1.0)]


class _Objective(Section):
    # Whether the model also predicts a variance for each channel.
    learned_variance: ClassVar[bool] = False


class Epsilon(_Objective):
    """Noise prediction with learned variance (ADM)."""

    learned_variance: ClassVar[bool] = True

    objective: Literal["epsilon"] = "epsilon"
    """epsilon: noise prediction with learned variance (ADM)"""
    timesteps: Timesteps = 1000
    """diffusion timesteps T"""
    beta_start: Beta = 1e-4
    """first beta of the linear noise schedule"""
    beta_end: Beta = 0.02
    """last beta of the linear noise schedule"""

    @model_validator(mode="after")
    def _betas_ascend(self) -> Self:
        if self.beta_start >= self.beta_end:
            raise ValueError(
                f"diffusion.beta_start is {self.beta_start}, but must be less than "
                f"diffusion.beta_end ({self.beta_end})"
            )
        return self


class Flow(_Objective):
    """Flow matching."""

    objective: Literal["flow"] = "flow"
    """flow: velocity on the linear path (SiT)"""
    timesteps: Timesteps = 1000
    """time range [0, T) of the model"""


class Edm(_Objective):
    """Preconditioned denoising (Karras et al. 2022, table 1)."""

    objective: Literal["edm"] = "edm"
    """edm: preconditioned denoising (EDM)"""
    p_mean: Annotated[float, Field(allow_inf_nan=False)] = -1.2
    """mean of ln(sigma) in training"""
    p_std: Positive = 1.2
    """standard deviation of ln(sigma) in training"""
    sigma_data: Positive = 0.5
    """standard deviation of the images, whose pixels are in [-1, 1]"""


class Song(_Objective):
    """Song et al.'s diffusions in EDM's terms."""

    objective: Literal["vp", "ve"] = "vp"
    """vp, ve: as edm, with the noise levels and preconditioning of the variance-preserving and the
    variance-exploding diffusion"""


class CustomObjective(_Objective):
    """A custom class."""

    objective: Annotated[str, OBJECTIVES]
    """or a custom class"""
    options: dict[str, Any] = {}
    """arguments of a custom objective"""


PackagedDiffusion = Epsilon | Flow | Edm | Song
# The forward process and the prediction target.
Diffusion = Annotated[
    Epsilon | Flow | Edm | Song | CustomObjective, Variants("objective", "epsilon")
]


def ddim_stride(timesteps: int, steps: int) -> int | None:
    """The stride that visits exactly `steps` of `timesteps` timesteps from 0; None if none does.

    A stride visits ceil(timesteps / stride) timesteps, so only the smallest stride that visits at
    most `steps` can visit exactly that many.
    """
    stride = -(-timesteps // steps)
    return stride if stride < timesteps and -(-timesteps // stride) == steps else None
