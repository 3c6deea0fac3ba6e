"""Section `diffusion`: the forward process and the prediction target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffit_train.config.base import Section


class Diffusion(Section):
    """The forward process and the prediction target."""

    objective: Literal["epsilon", "flow"] = Field(
        default="epsilon",
        description="epsilon: noise prediction with learned variance (ADM); flow: velocity on the "
        "linear path (SiT)",
    )
    timesteps: Annotated[int, Field(gt=1)] = Field(
        default=1000, description="diffusion timesteps T; flow: the time range [0, T) of the model"
    )
    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=1e-4, description="epsilon: first beta of the linear noise schedule"
    )
    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.02, description="epsilon: last beta of the linear noise schedule"
    )

    @property
    def learned_variance(self) -> bool:
        """Whether the model predicts a variance for each channel, too."""
        return self.objective == "epsilon"


def ddim_stride(timesteps: int, steps: int) -> int | None:
    """The stride that visits exactly `steps` of `timesteps` timesteps from 0; None if none does.

    A stride visits ceil(timesteps / stride) timesteps, so only the smallest stride that visits at
    most `steps` can visit exactly that many.
    """
    stride = -(-timesteps // steps)
    return stride if stride < timesteps and -(-timesteps // stride) == steps else None
