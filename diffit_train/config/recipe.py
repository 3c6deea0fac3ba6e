"""The typed recipe: one YAML file says all of a run.

Every key carries its unit in its name or its description. Impossible combinations are refused
here, before anything starts.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from diffit_train import storage
from diffit_train.config.presets import PRESETS

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


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
# Gradients that a rank gathers before they are exchanged. DeepSpeed's own bucket is ten times as
# large and takes 2 GB on every rank in fp32.
BUCKET_ELEMENTS = 50_000_000
# The published feature network, and where its weights come from.
INCEPTION = "inception"
PUBLISHED = "published"
# Statistics of the real pictures that are computed from data.source.
OWN = "own"
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


class Section(BaseModel):
    """A part of the recipe: immutable, unknown keys refused, every number finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Data(Section):
    """The pictures, and the latent shards made of them."""

    name: Name = Field(description="name of the latents under ROOT/latents")
    source: str = Field(description="folder, tar or parquet; `root:` means under ROOT")
    format: Literal["auto", "folder", "tar", "ilsvrc", "webdataset", "parquet"] = Field(
        default="auto", description="what the source is; auto: what its name and contents say"
    )
    resolution: PositiveInt = Field(description="side of the square pictures, in pixels")
    num_classes: PositiveInt = Field(description="number of classes")
    flip: bool = Field(default=False, description="also encode each picture mirrored (F = 2)")
    pictures_per_shard: PositiveInt = Field(default=512, description="pictures in a shard")
    max_rejected_fraction: Fraction = Field(
        default=0.01, description="stop when more of the pictures than this cannot be read"
    )
    expected_pictures: PositiveInt | None = Field(
        default=None, description="number of pictures, for `diffit plan` before they are encoded"
    )
    lanes: PositiveInt = Field(
        default=64, description="parallel streams of samples; a world size must divide them"
    )
    shuffle_window: PositiveInt = Field(
        default=1024, description="samples of a lane that are shuffled together"
    )


class AutoencoderFit(Section):
    """How `diffit autoencoder fit` trains an AutoencoderKL of one's own."""

    steps: PositiveInt = 250
    batch_size: PositiveInt = 64
    lr: Positive = 2e-3
    kl_weight: Positive = Field(default=1e-4, description="weight of the KL term beside the MSE")
    block_out_channels: tuple[PositiveInt, ...] = Field(
        default=(16, 32), description="channels of each level; all but the last halve the picture"
    )
    layers_per_block: PositiveInt = 1
    norm_num_groups: PositiveInt = 8
    seed: int = Field(default=0, ge=0)


class Autoencoder(Section):
    """The VAE between pictures and latents."""

    kind: Literal["kl", "tiny", "identity"] = Field(
        default="kl",
        description="diffusers' AutoencoderKL or AutoencoderTiny; identity: pixels as latents",
    )
    source: str = Field(
        default="", description="hub id or folder in diffusers' format; `root:` under ROOT"
    )
    latent_channels: PositiveInt = 4
    downsample: PositiveInt = Field(default=8, description="pixels for one latent pixel")
    scale: Positive | None = Field(
        default=None, description="latents are multiplied by it; null: the autoencoder's own"
    )
    batch_size: PositiveInt = Field(default=32, description="pictures encoded at once")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    fit: AutoencoderFit = AutoencoderFit()


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
        default=None, description="pictures after which a weight counts half"
    )
    ramp_ratio: Positive | None = Field(
        default=None, description="the half-life is at most this share of the pictures seen so far"
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
    batch_size: PositiveInt = Field(default=256, description="pictures of a global batch")
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
        description="most pictures that a worker takes at once; gradients of several are added "
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
        default=10_000, description="pictures of such an evaluation"
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
        default=64, description="pictures that pass through the networks at once"
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
        description="statistics of the real pictures: an .npz file of ADM or EDM, by path (`root:` "
        "under ROOT), s3:// or https:// URL, the last downloaded once under ROOT/references; own: "
        "computed from data.source",
    )
    neighbours: PositiveInt = Field(default=3, description="k of precision and recall")
    reference_pictures: PositiveInt = Field(
        default=10_000, description="most real pictures used for precision and recall"
    )
    grid_columns: PositiveInt = Field(default=10, description="pictures of a class in the grid")
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


class Scaling(Section):
    """How much of the cluster each command takes. It never changes a result."""

    workers: PositiveInt | Annotated[str, Field(pattern=r"^[1-9]\d*\.\.[1-9]\d*$")] = Field(
        default=1,
        description="training workers; 2..8 goes on with as many as there are, from 2 to 8",
    )
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    encode_actors: PositiveInt = Field(default=1, description="most autoencoder actors")
    encode_min_actors: PositiveInt = Field(
        default=1, description="autoencoder actors to begin with; more start as pictures wait"
    )
    encode_threads: PositiveInt = Field(
        default=1, description="processors that each autoencoder actor computes on, without a GPU"
    )
    evaluate_actors: PositiveInt = Field(default=1, description="generating actors")
    evaluate_batches: PositiveInt = Field(
        default=1, description="batches of an evaluation that an actor makes and commits at once"
    )
    gpus_per_actor: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    max_failures: int = Field(
        default=3, ge=-1, description="restarts of the training workers; -1: any number"
    )
    max_preemptions: int = Field(
        default=-1, ge=-1, description="restarts after announced preemptions; -1: any number"
    )
    resize_check_s: Positive = Field(
        default=60.0, description="seconds between looks whether an elastic run may grow"
    )
    shard_cache_gib: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="disk of each node that keeps copies of remote latent shards; 0: none",
    )
    shard_cache_folder: str = Field(
        default="", description="where they are kept; empty: the node's temporary folder"
    )

    @property
    def fewest_workers(self) -> int:
        """Training workers without which a run waits."""
        return self.workers if isinstance(self.workers, int) else int(self.workers.split("..")[0])

    @property
    def most_workers(self) -> int:
        """Training workers that a run takes where it can."""
        return self.workers if isinstance(self.workers, int) else int(self.workers.split("..")[1])

    @model_validator(mode="after")
    def _range_is_one(self) -> Self:
        if self.fewest_workers > self.most_workers:
            raise ValueError(
                f"scaling.workers is {self.workers!r}, but its first number must be the smaller"
            )
        return self


class Storage(Section):
    """Where everything lies."""

    root: str = Field(default=".", description="folder or s3://bucket/prefix; --root overrides it")

    @field_validator("root")
    @classmethod
    def _a_url_has_two_slashes(cls, root: str) -> str:
        if fault := storage.missing_slash(root):
            raise ValueError(fault)
        return root


class Tracking(Section):
    """MLflow."""

    uri: str | None = Field(default=None, description="null: sqlite under the root")
    experiment: str = Field(default="diffit", min_length=1)
    register_best: bool = Field(
        default=True,
        description="export the weights of a run's best evaluated checkpoint, and register them "
        "as model EXPERIMENT-RUN under the alias best",
    )


class Recipe(Section):
    """All of a run."""

    name: Name = Field(description="default name of the run")
    data: Data
    autoencoder: Autoencoder
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train
    evaluate: Evaluate
    scaling: Scaling = Scaling()
    storage: Storage = Storage()
    tracking: Tracking = Tracking()

    @property
    def latent_size(self) -> int:
        """Side of the square latent, h = w."""
        return self.data.resolution // self.autoencoder.downsample

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        data, autoencoder, model = self.data, self.autoencoder, self.model
        _divides(
            "autoencoder.downsample", autoencoder.downsample, "data.resolution", data.resolution
        )
        _divides("model.patch_size", model.patch_size, "the latent size", self.latent_size)
        _divides("model.num_heads", model.num_heads, "model.hidden_size", model.hidden_size)
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        train, data, scaling = self.train, self.data, self.scaling
        _divides("data.lanes", data.lanes, "train.batch_size", train.batch_size)
        if scaling.most_workers > data.lanes:
            raise ValueError(
                f"scaling.workers is {scaling.workers}, but must be at most data.lanes "
                f"({data.lanes})"
            )
        _divides(
            "train.log_every", train.log_every, "train.checkpoint_every", train.checkpoint_every
        )
        for name, every in (
            ("train.keep_every", train.keep_every),
            ("train.validate_every", train.validate_every),
        ):
            if every:
                _divides("train.checkpoint_every", train.checkpoint_every, name, every)
        if train.warmup_steps >= train.steps:
            raise ValueError(
                f"train.warmup_steps is {train.warmup_steps}, but must be below train.steps "
                f"({train.steps})"
            )
        return self

    @model_validator(mode="after")
    def _autoencoder_fits(self) -> Self:
        fit, kind = self.autoencoder.fit, self.autoencoder.kind
        if kind == "identity":
            for key, value, needed in (
                ("latent_channels", self.autoencoder.latent_channels, 3),
                ("downsample", self.autoencoder.downsample, 1),
            ):
                if value != needed:
                    raise ValueError(
                        f"autoencoder.{key} is {value}, but must be {needed} where "
                        "autoencoder.kind is 'identity'"
                    )
        elif not self.autoencoder.source:
            raise ValueError(
                f"autoencoder.source is empty, but autoencoder.kind {kind!r} needs a hub id or a "
                "folder in diffusers' format"
            )
        scaling = self.scaling
        if scaling.encode_min_actors > scaling.encode_actors:
            raise ValueError(
                f"scaling.encode_min_actors is {scaling.encode_min_actors}, but must be at most "
                f"scaling.encode_actors ({scaling.encode_actors})"
            )
        for channels in fit.block_out_channels:
            _divides(
                "autoencoder.fit.norm_num_groups",
                fit.norm_num_groups,
                "autoencoder.fit.block_out_channels",
                channels,
            )
        return self

    @model_validator(mode="after")
    def _diffusion_makes_sense(self) -> Self:
        diffusion, evaluate = self.diffusion, self.evaluate
        if diffusion.beta_start >= diffusion.beta_end:
            raise ValueError(
                f"diffusion.beta_start is {diffusion.beta_start}, but must be below "
                f"diffusion.beta_end ({diffusion.beta_end})"
            )
        if evaluate.sampler.steps > diffusion.timesteps:
            raise ValueError(
                f"evaluate.sampler.steps is {evaluate.sampler.steps}, but must be at most "
                f"diffusion.timesteps ({diffusion.timesteps})"
            )
        if evaluate.sampler.spacing == "ddim":
            _strides(evaluate.sampler.steps, diffusion.timesteps)
        samplers = SAMPLERS[diffusion.objective]
        if evaluate.sampler.name not in samplers:
            raise ValueError(
                f"evaluate.sampler.name is {evaluate.sampler.name!r}, but must be one of "
                f"{', '.join(samplers)} where diffusion.objective is {diffusion.objective!r}"
            )
        averages = ("raw", *self.train.ema)
        if evaluate.reconstructed is not None:
            if not self.train.power_profiles():
                raise ValueError(
                    f"evaluate.weights is {evaluate.weights!r}, but no average in train.ema has a "
                    "sigma_rel of which it could be made"
                )
        elif evaluate.weights not in averages:
            raise ValueError(
                f"evaluate.weights is {evaluate.weights!r}, but must be one of "
                f"{', '.join(averages)}"
            )
        guided = evaluate.guidance.channels
        if guided != "all" and guided > self.autoencoder.latent_channels:
            raise ValueError(
                f"evaluate.guidance.channels is {guided}, but must be at most "
                f"autoencoder.latent_channels ({self.autoencoder.latent_channels})"
            )
        if not self.model.conditional and evaluate.guidance.kind != "none":
            raise ValueError(
                f"evaluate.guidance.kind is {evaluate.guidance.kind!r}, but must be 'none' where "
                "model.conditional is false"
            )
        return self

    # ---- What determines an output. Amounts of resources, places and tracking never do. ----

    def encode_identity(self) -> dict[str, Any]:
        """The keys that determine the latent shards."""
        data = self.data.model_dump(
            mode="json",
            include={"source", "resolution", "num_classes", "flip", "pictures_per_shard"},
        )
        autoencoder = self.autoencoder.model_dump(mode="json", exclude={"fit"})
        return {"data": data, "autoencoder": autoencoder}

    def train_identity(self) -> dict[str, Any]:
        """The keys that determine the weights after a given step."""
        free = {*KEEPING_KEYS, *EXECUTION_KEYS}
        if self.train.lr_schedule != "cosine":
            free.add("steps")
        if self.train.lr_schedule != "inverse_sqrt":
            free.add("lr_decay_start")
        return {
            **self.encode_identity(),
            "order": self.data.model_dump(mode="json", include={"name", "lanes", "shuffle_window"}),
            "model": self.model.model_dump(mode="json", exclude={"preset", "attention"}),
            "diffusion": self.diffusion.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json", exclude=free),
        }

    def evaluate_identity(self) -> dict[str, Any]:
        """The keys that determine the figures of a given checkpoint."""
        return self.evaluate.model_dump(mode="json", exclude={"features": {"fit"}, "compile": True})

    def encode_hash(self) -> str:
        """SHA-256 of `encode_identity`."""
        return storage.digest(self.encode_identity())

    def train_hash(self) -> str:
        """SHA-256 of `train_identity`: the recipe hash of a run."""
        return storage.digest(self.train_identity())

    def flat(self) -> dict[str, Any]:
        """Dotted keys to values, as logged to MLflow."""
        return dict(_flatten(self.model_dump(mode="json")))


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise ValueError(f"{small_name} is {small}, but must divide {large_name} ({large})")


def ddim_stride(timesteps: int, steps: int) -> int | None:
    """The smallest stride below `timesteps` that takes `steps` of them from 0; None: there is none.

    A stride takes ceil(timesteps / stride), so only the smallest that takes at most `steps` can
    take that many.
    """
    stride = -(-timesteps // steps)
    return stride if stride < timesteps and -(-timesteps // stride) == steps else None


def _strides(steps: int, timesteps: int) -> None:
    if ddim_stride(timesteps, steps) is not None:
        return
    possible = [n for n in range(1, timesteps + 1) if ddim_stride(timesteps, n) is not None]
    nearest = [*[n for n in possible if n < steps][-1:], *[n for n in possible if n > steps][:1]]
    raise ValueError(
        f"evaluate.sampler.steps is {steps}, but with evaluate.sampler.spacing 'ddim' a whole "
        f"stride must take that many of diffusion.timesteps ({timesteps}); the nearest that does "
        f"so: {' or '.join(map(str, nearest))}"
    )


def _flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            pairs += _flatten(item, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, item))
    return pairs
