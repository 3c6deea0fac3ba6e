"""Section `diffusion`: the forward process, and what the model predicts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffit_train.config.base import Section


class Diffusion(Section):
    """The forward process, and what the model predicts."""

    objective: Literal["epsilon", "flow"] = Field(
        default="epsilon",
        description="epsilon: ADM's noise prediction with learned-range variance; "
        "flow: velocity on the linear path (SiT)",
    )
    timesteps: Annotated[int, Field(gt=1)] = 1000
    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-4
    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02


def ddim_stride(timesteps: int, steps: int) -> int | None:
    """The smallest stride below `timesteps` that takes `steps` of them from 0; None: there is none.

    A stride takes ceil(timesteps / stride), so only the smallest that takes at most `steps` can
    take that many.
    """
    stride = -(-timesteps // steps)
    return stride if stride < timesteps and -(-timesteps // stride) == steps else None
