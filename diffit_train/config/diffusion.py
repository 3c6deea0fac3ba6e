"""Section `diffusion`: the forward process and the prediction target."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from diffit_train.config.base import Positive, Section
from diffit_train.plugins import Plugged

OBJECTIVES = Plugged("diffusion.objective", "diffit_train.objectives", ("epsilon", "flow", "edm"))


class Edm(Section):
    """Noise levels and preconditioning of the objective edm (Karras et al. 2022, table 1)."""

    variant: Literal["edm", "vp", "ve"] = Field(
        default="edm",
        description="edm: EDM's own; vp, ve: those of the variance-preserving and the "
        "variance-exploding diffusion, which have no options",
    )
    p_mean: Annotated[float, Field(allow_inf_nan=False)] = Field(
        default=-1.2, description="mean of ln(sigma) in training"
    )
    p_std: Positive = Field(default=1.2, description="standard deviation of ln(sigma) in training")
    sigma_data: Positive = Field(
        default=0.5, description="standard deviation of the images, whose pixels are in [-1, 1]"
    )

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        for key in ("p_mean", "p_std", "sigma_data"):
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.variant != "edm" and value != default:
                raise ValueError(
                    f"diffusion.edm.{key} is {value}, but diffusion.edm.variant is "
                    f"{self.variant!r}; only variant 'edm' has this option"
                )
        return self


class Diffusion(Section):
    """The forward process and the prediction target."""

    objective: Annotated[str, OBJECTIVES] = Field(
        default="epsilon",
        description="epsilon: noise prediction with learned variance (ADM); flow: velocity on the "
        "linear path (SiT); edm: preconditioned denoising (EDM); or a custom class, with the "
        "arguments in diffusion.options",
    )
    options: dict[str, Any] = Field(default={}, description="arguments of a custom objective")
    timesteps: Annotated[int, Field(gt=1)] = Field(
        default=1000, description="diffusion timesteps T; flow: the time range [0, T) of the model"
    )
    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=1e-4, description="epsilon: first beta of the linear noise schedule"
    )
    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.02, description="epsilon: last beta of the linear noise schedule"
    )
    edm: Edm = Edm()

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        if self.options and not self.plugged:
            raise ValueError(
                f"diffusion.options has {', '.join(self.options)}, but diffusion.objective is "
                f"{self.objective!r}; only a custom objective has options"
            )
        if self.objective != "edm" and self.edm != Edm():
            changed = self.edm.model_dump(exclude_defaults=True)
            raise ValueError(
                f"diffusion.edm has {', '.join(changed)}, but diffusion.objective is "
                f"{self.objective!r}; set diffusion.objective=edm, or remove diffusion.edm"
            )
        return self

    @property
    def plugged(self) -> bool:
        """Whether the objective is another package's."""
        return OBJECTIVES.is_plugged(self.objective)

    def unused_keys(self) -> set[str]:
        """Keys that this objective does not have, which then belong to no hash."""
        unused = set() if self.objective == "edm" else {"edm"}
        return unused if self.plugged else {*unused, "options"}

    @property
    def learned_variance(self) -> bool:
        """Whether the model also predicts a variance for each channel."""
        return self.objective == "epsilon"


def ddim_stride(timesteps: int, steps: int) -> int | None:
    """The stride that visits exactly `steps` of `timesteps` timesteps from 0; None if none does.

    A stride visits ceil(timesteps / stride) timesteps, so only the smallest stride that visits at
    most `steps` can visit exactly that many.
    """
    stride = -(-timesteps // steps)
    return stride if stride < timesteps and -(-timesteps // stride) == steps else None
