"""Section `train`: optimization, EMA, checkpoints and limits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffit_train.config.base import Fraction, Name, Positive, PositiveInt, Section

# Gradients that a rank gathers before they are exchanged. DeepSpeed's own bucket is ten times as
# large and takes 2 GB on every rank in fp32.
BUCKET_ELEMENTS = 50_000_000


# Keys of `train` that say how a step is computed; results differ by rounding only.
EXECUTION_KEYS = (
    "zero_stage",
    "offload",
    "micro_batch_size",
    "compile",
    "activation_checkpointing",
    "checkpoint_every_nth_block",
    "profile_steps",
)


# Keys of `train` that say what is kept of a run and when it gives up.
KEEPING_KEYS = (
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "log_every",
    "ema_snapshot_every",
    "validate_every",
    "validate_samples",
    "max_consecutive_bad_steps",
    "max_rollbacks",
)


# Names of what a checkpoint holds beside the averages of the weights.
RESERVED_KINDS = ("raw", "master", "exp_avg", "exp_avg_sq")


class EmaProfile(Section):
    """An average of the weights over training, by one of three rules.

    `decay`: the constant weight of the past. `half_life_images`: EDM's, which may rise at the
    beginning. `sigma_rel`: EDM2's power function; of several such averages `diffit ema
    reconstruct` makes any other afterwards.
    """

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        default=None, description="weight of the past at each step"
    )
    half_life_images: Positive | None = Field(
        default=None, description="images after which a weight counts half"
    )
    ramp_ratio: Positive | None = Field(
        default=None, description="the half-life is at most this share of the images seen so far"
    )
    sigma_rel: Annotated[float, Field(gt=0.0, lt=0.28)] | None = Field(
        default=None, description="width of the profile, relative to the length of training"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        rules = ("decay", "half_life_images", "sigma_rel")
        given = [name for name in rules if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"an average of the weights needs exactly one of {', '.join(rules)}, but has "
                f"{', '.join(given) or 'none'}"
            )
        if self.ramp_ratio is not None and self.half_life_images is None:
            raise ValueError("ramp_ratio belongs to half_life_images, which is missing")
        return self


class Start(Section):
    """The checkpoint that a new run starts from; `diffit train --from` fills it in."""

    run: Name = Field(description="run under the same root")
    step: int = Field(ge=0, description="its checkpoint")
    weights: str = Field(default="ema", description="which weights: raw, or the name of an EMA")
    digest: str = Field(description="SHA-256 of the checkpoint's index")


class Train(Section):
    """Optimisation."""

    steps: PositiveInt = Field(description="optimizer steps in all")
    batch_size: PositiveInt = Field(default=256, description="images of a global batch")
    lr: Positive = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear rise of the lr")
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = Field(
        default="constant",
        description="after the rise: constant; half a cosine to 0 at `steps`; or constant up to "
        "`lr_decay_start` and then falling with the root of the step (EDM2)",
    )
    lr_decay_start: PositiveInt = Field(
        default=70_000, description="inverse_sqrt: step from which the learning rate falls"
    )
    grad_clip: Positive | None = Field(default=None, description="bound of the gradient's norm")
    label_dropout: Fraction = Field(default=0.1, description="share of labels replaced by null")
    start: Start | None = Field(
        default=None, description="checkpoint of another run to start from; set by --from"
    )
    ema: dict[Name, EmaProfile] = Field(
        default={"ema": EmaProfile(decay=0.9999)},
        description="averages of the weights, by name; evaluate.weights chooses one",
    )
    ema_snapshot_every: PositiveInt | None = Field(
        default=None,
        description="steps between snapshots of the averages with sigma_rel, all of them kept",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="DeepSpeed ZeRO stage")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        description="what is kept in the memory of the host: master weights, moments and EMA; "
        "with parameters, the weights too (ZeRO stage 3)",
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None,
        description="most images that a worker takes at once; gradients of several are added "
        "up. null: a worker's whole share of the batch",
    )
    precision: Literal["fp32", "bf16", "bf16_autocast"] = Field(
        default="fp32",
        description="bf16: bf16 weights beside fp32 master weights; bf16_autocast: fp32 weights, "
        "bf16 matrix products",
    )
    compile: bool = Field(default=False, description="compile the blocks by torch.compile")
    activation_checkpointing: Literal["none", "selective", "blocks"] = Field(
        default="none",
        description="what is computed again in the backward pass; selective: all but matrix "
        "products and attention; blocks: everything inside a block",
    )
    checkpoint_every_nth_block: PositiveInt = Field(
        default=1, description="blocks to which activation_checkpointing applies: every n-th"
    )
    seed: int = Field(default=0, ge=0)
    checkpoint_every: PositiveInt = Field(default=10_000, description="steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(
        default=3, description="newest checkpoints kept, beside that of step 0"
    )
    keep_every: PositiveInt | None = Field(
        default=None, description="checkpoints at multiples of so many steps are kept for good"
    )
    validate_every: PositiveInt | None = Field(
        default=None,
        description="steps between checkpoints that are evaluated while training goes on",
    )
    validate_samples: Annotated[int, Field(gt=1)] = Field(
        default=10_000, description="images of such an evaluation"
    )
    log_every: PositiveInt = Field(default=50, description="steps averaged in a point of the log")
    loss_limit: Positive | None = Field(
        default=None, description="a step whose loss is larger is skipped and reported"
    )
    grad_norm_limit: Positive | None = Field(
        default=None, description="a step whose gradient norm is larger is skipped and reported"
    )
    max_consecutive_bad_steps: PositiveInt = Field(
        default=5,
        description="skipped steps in a row after which the run goes back to its last checkpoint "
        "and passes over their batches",
    )
    max_rollbacks: int = Field(
        default=3, ge=0, description="how often a run may go back in this way before it stops"
    )
    profile_steps: tuple[int, int] | None = Field(
        default=None, description="first and last step of which torch.profiler writes a trace"
    )

    @model_validator(mode="after")
    def _averages_are_named(self) -> Self:
        for name in self.ema:
            if name in RESERVED_KINDS:
                raise ValueError(
                    f"train.ema has an average named {name!r}, but these names are taken: "
                    f"{', '.join(RESERVED_KINDS)}"
                )
        if self.ema_snapshot_every and not self.power_profiles():
            raise ValueError(
                f"train.ema_snapshot_every is {self.ema_snapshot_every}, but no average in "
                "train.ema has a sigma_rel"
            )
        return self

    @model_validator(mode="after")
    def _execution_fits(self) -> Self:
        stage, checks = self.zero_stage, []
        if stage == 0 and self.precision == "bf16":
            checks.append("train.precision 'bf16' (fp32 master weights need stage 1 or more)")
        if stage == 0 and self.offload != "none":
            checks.append(f"train.offload {self.offload!r} (it needs stage 1 or more)")
        if stage in (1, 2) and self.offload == "parameters":
            checks.append("train.offload 'parameters' (it needs stage 3)")
        if stage == 1 and self.precision == "bf16" and self.micro_batch_size:
            checks.append(
                "train.micro_batch_size with train.precision 'bf16' (gradients would be added up "
                "in bf16; stages 2 and 3 add them up in fp32)"
            )
        if stage == 3 and self.compile:
            checks.append("train.compile true (the weights are gathered while a block runs)")
        if checks:
            raise ValueError(f"train.zero_stage is {stage}, which does not go with {checks[0]}")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 0 <= first <= last or last - first >= 100:
                raise ValueError(
                    f"train.profile_steps is [{first}, {last}], but must be a first and a last "
                    "step, at most 100 of them"
                )
        return self

    def power_profiles(self) -> dict[str, float]:
        """sigma_rel of each average that has one, by name."""
        return {n: p.sigma_rel for n, p in self.ema.items() if p.sigma_rel is not None}
