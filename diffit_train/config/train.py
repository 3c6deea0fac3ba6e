"""Section `train`: optimization, EMA, checkpoints and limits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diffit_train.config.base import (
    Fraction,
    Name,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
)

# Gradient elements that a rank collects before reducing them. DeepSpeed's default bucket is ten
# times larger and takes 2 GB on every rank in fp32.
BUCKET_ELEMENTS = 50_000_000

# Keys of `train` that set how a step is computed; results differ by rounding only.
EXECUTION_KEYS = (
    "zero_stage",
    "offload",
    "micro_batch_size",
    "compile",
    "activation_checkpointing",
    "activation_checkpoint_every",
    "overlap_comm",
    "deterministic",
    "profile_steps",
)

# Keys of `train` that set what is kept of a run and when it gives up.
KEEPING_KEYS = (
    "checkpoint_every",
    "checkpoint_every_s",
    "keep_checkpoints",
    "keep_every",
    "log_every",
    "ema_snapshot_every",
    "validate_every",
    "validate_samples",
    "sample_every",
    "max_consecutive_bad_steps",
    "max_rollbacks",
)

# Labels that the augmentation gives the model, as EDM's for CIFAR-10 and FFHQ: two flips, scaling,
# and two each of rotation, anisotropic scaling and translation.
AUGMENT_LABELS = 9

# Names of the states of a checkpoint other than the EMAs.
RESERVED_KINDS = ("raw", "master", "exp_avg", "exp_avg_sq")


class EmaProfile(Section):
    """An EMA of the weights, by one of three rules.

    `decay`: constant decay. `half_life_images`: EDM's half-life, optionally ramped up. `sigma_rel`:
    EDM2's power-function profile; from snapshots of several of them, `diffit export --sigma-rel`
    makes any other profile after training.
    """

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """EMA decay per step"""
    half_life_images: Positive | None = None
    """EMA half-life, in images"""
    ramp_ratio: Positive | None = None
    """limit the half-life to this fraction of the images seen so far"""
    sigma_rel: Annotated[float, Field(gt=0.0, lt=0.28)] | None = None
    """width of EDM2's power-function profile, relative to training"""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        rules = ("decay", "half_life_images", "sigma_rel")
        given = [name for name in rules if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"an EMA needs exactly one of {', '.join(rules)}, but has "
                f"{', '.join(given) or 'none'}"
            )
        if self.ramp_ratio is not None and self.half_life_images is None:
            raise ValueError(
                f"ramp_ratio is {self.ramp_ratio}, but needs half_life_images, which is missing"
            )
        return self


class Start(Section):
    """The checkpoint that a new run starts from; `diffit train --init-from` fills it in."""

    run: Name
    """name of a run under the same root"""
    step: NonNegativeInt
    """step of the checkpoint"""
    weights: str = "ema"
    """weights to load: raw, or the name of an EMA"""
    digest: str
    """SHA-256 of the checkpoint's index"""


class Train(Section):
    """Optimization."""

    steps: PositiveInt
    """optimizer steps in total"""
    batch_size: PositiveInt = 256
    """images per global batch"""
    lr: Positive = 3e-4
    """peak learning rate"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments"""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay"""
    warmup_steps: NonNegativeInt = 0
    """steps of linear learning rate warmup"""
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """learning rate after warmup; cosine: cosine decay to 0 at `steps`; inverse_sqrt: constant up
    to `lr_decay_start`, then proportional to 1/sqrt(step) (EDM2)"""
    lr_decay_start: PositiveInt = 70_000
    """inverse_sqrt: step at which the decay starts"""
    grad_clip: Positive | None = None
    """maximum global norm of the gradient; null: no clipping"""
    label_dropout: Fraction = 0.1
    """fraction of labels replaced by the null label"""
    augment: Fraction = 0.0
    """probability of each augmentation of EDM, whose labels the model is given; on pixels only.
    Images are then also flipped horizontally in half of the cases"""
    start: Start | None = None
    """checkpoint of another run to start from, set by --init-from"""
    ema: dict[Name, EmaProfile] = {"ema": EmaProfile(decay=0.9999)}
    """EMAs of the weights, by name; evaluate.weights selects one"""
    ema_snapshot_every: PositiveInt | None = None
    """steps between snapshots of the EMAs with sigma_rel; all snapshots are kept"""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage"""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """what is kept in host memory; optimizer: master weights, moments and EMAs; parameters: the
    weights too (ZeRO stage 3)"""
    micro_batch_size: PositiveInt | None = None
    """maximum number of images per worker and forward pass; gradients accumulate over several.
    null: a worker's whole share of the batch"""
    precision: Literal["fp32", "tf32", "bf16", "bf16_autocast"] = "fp32"
    """fp32: full float32; tf32: float32 whose matrix products and convolutions run on a GPU's
    tensor cores; bf16: bf16 weights with fp32 master weights; bf16_autocast: fp32 weights, bf16
    matrix products"""
    compile: bool = False
    """compile the transformer blocks with torch.compile"""
    activation_checkpointing: Literal["none", "selective", "blocks"] = "none"
    """what the backward pass recomputes; selective: all but matrix products and attention; blocks:
    everything inside a block"""
    activation_checkpoint_every: PositiveInt = 1
    """apply activation_checkpointing to every n-th block"""
    overlap_comm: bool | None = None
    """reduce gradients while the backward pass runs; null: at ZeRO stage 3 only"""
    deterministic: bool = False
    """use only operations that give the same bits each time on the same devices; slower, and
    refuses the attention kernel flex"""
    seed: NonNegativeInt = 0
    """seed of the initial weights, sample order and noise"""
    checkpoint_every: PositiveInt = 10_000
    """steps between checkpoints"""
    checkpoint_every_s: Positive | None = None
    """also write a checkpoint when the last one is this many seconds old; null: by steps only"""
    keep_checkpoints: PositiveInt = 3
    """number of newest checkpoints kept, in addition to that of step 0"""
    keep_every: PositiveInt | None = None
    """keep every N-th step's checkpoint permanently; null: none"""
    validate_every: PositiveInt | None = None
    """steps between evaluations of checkpoints during training; null: none"""
    validate_samples: Annotated[int, Field(gt=1)] = 10_000
    """images generated per evaluation during training"""
    sample_every: PositiveInt | None = None
    """steps between grids of samples of fixed seeds; each is drawn from the first checkpoint due,
    on the CPU of the machine that started the training, and shown in MLflow; null: none"""
    log_every: PositiveInt = 50
    """steps averaged per log entry"""
    loss_limit: Positive | None = None
    """skip and report a step with a larger loss; null: no limit"""
    grad_norm_limit: Positive | None = None
    """skip and report a step with a larger gradient norm; null: no limit"""
    max_consecutive_bad_steps: PositiveInt = 5
    """consecutive skipped steps before the run rolls back to its last checkpoint and continues
    without their batches"""
    max_rollbacks: NonNegativeInt = 3
    """rollbacks before the run fails"""
    profile_steps: tuple[int, int] | None = None
    """first and last step of a torch.profiler trace; null: no trace"""

    @model_validator(mode="after")
    def _ema_names_are_free(self) -> Self:
        for name in self.ema:
            if name in RESERVED_KINDS:
                raise ValueError(
                    f"train.ema has an EMA named {name!r}, but these names are reserved: "
                    f"{', '.join(RESERVED_KINDS)}"
                )
        if self.ema_snapshot_every and not self.power_profiles():
            raise ValueError(
                f"train.ema_snapshot_every is {self.ema_snapshot_every}, but no EMA in train.ema "
                "has a sigma_rel"
            )
        return self

    @model_validator(mode="after")
    def _check_execution(self) -> Self:
        stage, conflicts = self.zero_stage, []
        if stage == 0 and self.precision == "bf16":
            conflicts.append("train.precision 'bf16' (fp32 master weights need stage 1 or higher)")
        if stage == 0 and self.offload != "none":
            conflicts.append(f"train.offload {self.offload!r} (needs stage 1 or higher)")
        if stage in (1, 2) and self.offload == "parameters":
            conflicts.append("train.offload 'parameters' (needs stage 3)")
        if stage == 1 and self.precision == "bf16" and self.micro_batch_size:
            conflicts.append(
                "train.micro_batch_size with train.precision 'bf16' (gradients would accumulate "
                "in bf16; stages 2 and 3 accumulate them in fp32)"
            )
        if stage == 3 and self.compile:
            conflicts.append("train.compile true (stage 3 gathers the weights while a block runs)")
        if conflicts:
            raise ValueError(
                f"train.zero_stage is {stage}, which is incompatible with {conflicts[0]}"
            )
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 0 <= first <= last or last - first >= 100:
                raise ValueError(
                    f"train.profile_steps is [{first}, {last}], but must be the first and last of "
                    "at most 100 steps"
                )
        return self

    def power_profiles(self) -> dict[str, float]:
        """sigma_rel of each EMA that has one, by name."""
        return {n: p.sigma_rel for n, p in self.ema.items() if p.sigma_rel is not None}
