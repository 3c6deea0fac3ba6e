"""Section `model`: the transformer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffit_train.config.base import Positive, PositiveInt, Section
from diffit_train.config.presets import PRESETS


class Model(Section):
    """The transformer. Keys beside `preset` change what the preset says."""

    preset: str | None = Field(
        default=None, description=f"named sizes: {', '.join(PRESETS)}; null: the keys below"
    )
    architecture: Literal["diffit", "dit", "dit_tmsa"] = Field(
        default="diffit", description="DiffiT; DiT with adaLN-Zero; DiT with TMSA in its place"
    )
    patch_size: PositiveInt = 2
    hidden_size: Annotated[int, Field(gt=0, multiple_of=4)] = 1152
    depth: PositiveInt = 28
    num_heads: PositiveInt = 16
    mlp_ratio: Positive = 4.0
    conditional: bool = Field(default=True, description="whether the model is told the label")
    position_side: PositiveInt | None = Field(
        default=None,
        description="side of the token grid over which the fixed positions spread; null: the "
        "model's own. A model that starts from one of another resolution keeps that one's",
    )
    label_init_std: Positive = Field(
        default=0.02, description="standard deviation of the label table at the start"
    )
    attention: Literal["auto", "reference", "sdpa", "chunked", "flex"] = Field(
        default="auto", description="attention kernel; auto: flex on CUDA, chunked elsewhere"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if name is None:
            return values
        if name not in PRESETS:
            raise ValueError(f"model.preset is {name!r}, but must be one of: {', '.join(PRESETS)}")
        return {**PRESETS[name], **values}
