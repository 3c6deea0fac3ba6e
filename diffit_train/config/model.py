"""Section `model`: the transformer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffit_train.config.base import Positive, PositiveInt, Section
from diffit_train.config.presets import PRESETS


class Model(Section):
    """The transformer. Other keys override what `preset` sets."""

    preset: str | None = Field(
        default=None, description=f"named size: {', '.join(PRESETS)}; null: the keys below"
    )
    architecture: Literal["diffit", "dit", "dit_tmsa"] = Field(
        default="diffit",
        description="diffit: DiffiT; dit: DiT with adaLN-Zero; dit_tmsa: DiT with TMSA instead of "
        "adaLN-Zero",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if name is None:
            return values
        if name not in PRESETS:
            raise ValueError(f"model.preset is {name!r}, but must be one of: {', '.join(PRESETS)}")
        return {**PRESETS[name], **values}
