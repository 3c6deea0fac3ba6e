"""The typed recipe: one YAML file defines a whole run.

Every key states its unit in its name or description. Impossible combinations are rejected here,
before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from pydantic import model_validator

from diffit_train import storage
from diffit_train.config.autoencoder import Autoencoder
from diffit_train.config.base import Name, Section, flatten
from diffit_train.config.data import Data
from diffit_train.config.diffusion import Diffusion, Epsilon, Flow, ddim_stride
from diffit_train.config.evaluate import FREE_KEYS, SAMPLERS, Evaluate
from diffit_train.config.model import ImageModel, LatentModel, Model, UNetModel
from diffit_train.config.scaling import Scaling
from diffit_train.config.storage import Storage
from diffit_train.config.tracking import Tracking
from diffit_train.config.train import EXECUTION_KEYS, KEEPING_KEYS, Train


class Recipe(Section):
    """Everything that defines a run."""

    name: Name
    """default name of the run"""
    data: Data
    autoencoder: Autoencoder
    """What is between images and latents."""
    model: Model = LatentModel()
    """The network."""
    diffusion: Diffusion = Epsilon()
    """The forward process and the prediction target."""
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
    def _sections_agree(self) -> Self:
        if conflicts := [*_sizes(self), *_training(self), *_evaluation(self)]:
            raise ValueError("\n".join(conflicts))
        return self

    # ---- What determines an output: never resources, locations or tracking ----

    def image_identity(self) -> dict[str, Any]:
        """The keys that determine the images and their labels."""
        return self.data.image_identity()

    def encode_identity(self) -> dict[str, Any]:
        """The keys that determine the latent shards."""
        data = self.data.model_dump(mode="json", include={"flip", "images_per_shard"})
        return {
            "data": {**self.image_identity(), **data},
            "autoencoder": self.autoencoder.identity(),
        }

    def train_identity(self) -> dict[str, Any]:
        """The keys that determine the weights at a given step."""
        free = {*KEEPING_KEYS, *EXECUTION_KEYS}
        if self.train.lr_schedule != "cosine":
            free.add("steps")
        if self.train.lr_schedule != "inverse_sqrt":
            free.add("lr_decay_start")
        return {
            **self.encode_identity(),
            "order": self.data.model_dump(
                mode="json", include={"name", "shuffle_streams", "shuffle_window"}
            ),
            "model": self.model.model_dump(mode="json", exclude={"preset", "attention"}),
            "diffusion": self.diffusion.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json", exclude=free),
        }

    def evaluate_identity(self) -> dict[str, Any]:
        """The keys that determine the metrics of a given checkpoint."""
        free: dict[str, Any] = {"features": {"fit"}, **dict.fromkeys(FREE_KEYS, True)}
        return self.evaluate.model_dump(mode="json", exclude=free)

    def encode_hash(self) -> str:
        """SHA-256 of `encode_identity`."""
        return storage.digest(self.encode_identity())

    def train_hash(self) -> str:
        """SHA-256 of `train_identity`: the recipe hash of a run."""
        return storage.digest(self.train_identity())

    def flat(self) -> dict[str, Any]:
        """Dotted keys to values, as logged to MLflow."""
        return flatten(self.model_dump(mode="json"))


# ---- What sections must agree on ----


def _sizes(recipe: Recipe) -> Iterator[str]:
    """Sizes of images, latents and network that do not fit each other."""
    model, resolution, kind = recipe.model, recipe.data.resolution, recipe.autoencoder.kind
    factor, side = recipe.autoencoder.downsample, recipe.latent_size
    yield from _divides("autoencoder.downsample", factor, "data.resolution", resolution)
    if isinstance(model, LatentModel):
        yield from _divides("model.patch_size", model.patch_size, "the latent size", side)
        yield from _divides(
            "model.num_heads", model.num_heads, "model.hidden_size", model.hidden_size
        )
    if isinstance(model, ImageModel):
        key, stages = "channels", len(model.channels)
        for stage in range(stages):
            name = f"the resolution {resolution >> stage} of stage {stage + 1}"
            yield from _divides("model.window", model.window, name, resolution >> stage)
    elif isinstance(model, UNetModel):
        key, stages = "multipliers", len(model.multipliers)
        sides = [resolution >> stage for stage in range(stages)]
        for side in {*model.attention_resolutions} - {*sides}:
            yield (
                f"model.attention_resolutions has {side}, but the stages have "
                f"{', '.join(map(str, sides))}"
            )
    else:
        return
    if kind != "identity":
        yield (
            f"model.architecture is {model.architecture!r}, which works on pixels, but "
            f"autoencoder.kind is {kind!r}; set autoencoder.kind=identity"
        )
    if resolution % 2 ** (stages - 1):
        yield (
            f"data.resolution is {resolution}, but the {stages} stages of model.{key} need a "
            f"multiple of {2 ** (stages - 1)}"
        )


def _training(recipe: Recipe) -> Iterator[str]:
    """Keys of `train` that do not fit others."""
    train, streams, scaling = recipe.train, recipe.data.shuffle_streams, recipe.scaling
    every, model = train.checkpoint_every, recipe.model
    yield from _divides("data.shuffle_streams", streams, "train.batch_size", train.batch_size)
    yield from _divides("train.log_every", train.log_every, "train.checkpoint_every", every)
    yield from _divides("train.checkpoint_every", every, "train.keep_every", train.keep_every or 0)
    yield from _divides(
        "train.checkpoint_every", every, "train.validate_every", train.validate_every or 0
    )
    if scaling.max_workers > streams:
        yield (
            f"scaling.workers is {scaling.workers}, but must be at most data.shuffle_streams "
            f"({streams}); lower it, or raise data.shuffle_streams"
        )
    if train.deterministic and model.attention == "flex":
        yield (
            "train.deterministic is true, but model.attention 'flex' sums the gradient of the "
            "position bias by atomic additions; set model.attention=sdpa"
        )
    if train.augment and not model.on_pixels:
        yield (
            f"train.augment is {train.augment}, but model.architecture {model.architecture!r} "
            "does not take the labels of the augmentation; set train.augment=0"
        )
    if train.warmup_steps >= train.steps:
        yield (
            f"train.warmup_steps is {train.warmup_steps}, but must be less than train.steps "
            f"({train.steps})"
        )


def _evaluation(recipe: Recipe) -> Iterator[str]:
    """Keys of `evaluate` that do not fit others."""
    diffusion, evaluate = recipe.diffusion, recipe.evaluate
    channels = recipe.autoencoder.latent_channels
    sampler, guidance = evaluate.sampler, evaluate.guidance
    samplers = SAMPLERS.get(diffusion.objective, ("custom",))
    if sampler.name not in samplers:
        yield (
            f"evaluate.sampler.name is {sampler.name!r}, but must be one of {', '.join(samplers)} "
            f"when diffusion.objective is {diffusion.objective!r}"
        )
    if isinstance(diffusion, Epsilon | Flow) and sampler.steps > diffusion.timesteps:
        yield (
            f"evaluate.sampler.steps is {sampler.steps}, but must be at most diffusion.timesteps "
            f"({diffusion.timesteps})"
        )
    if isinstance(diffusion, Epsilon) and sampler.name == "ddim" and sampler.spacing == "ddim":
        yield from _ddim_stride(sampler.steps, diffusion.timesteps)
    weights = ("raw", *recipe.train.ema)
    if evaluate.reconstructed is not None:
        if not recipe.train.power_profiles():
            yield (
                f"evaluate.weights is {evaluate.weights!r}, but no EMA in train.ema has a "
                "sigma_rel to reconstruct it from"
            )
    elif evaluate.weights not in weights:
        yield f"evaluate.weights is {evaluate.weights!r}, but must be one of {', '.join(weights)}"
    if guidance.kind == "none":
        return
    if guidance.channels != "all" and guidance.channels > channels:
        yield (
            f"evaluate.guidance.channels is {guidance.channels}, but must be at most "
            f"autoencoder.latent_channels ({channels})"
        )
    if not recipe.model.conditional:
        yield (
            f"evaluate.guidance.kind is {guidance.kind!r}, but must be 'none' when "
            "model.conditional is false"
        )


def _divides(small_name: str, small: int, large_name: str, large: int) -> Iterator[str]:
    if large % small:
        yield f"{small_name} is {small}, but must divide {large_name} ({large})"


def _ddim_stride(steps: int, timesteps: int) -> Iterator[str]:
    if ddim_stride(timesteps, steps) is None:
        possible = [n for n in range(1, timesteps + 1) if ddim_stride(timesteps, n) is not None]
        near = [*[n for n in possible if n < steps][-1:], *[n for n in possible if n > steps][:1]]
        yield (
            f"evaluate.sampler.steps is {steps}, but no integer stride through diffusion.timesteps "
            f"({timesteps}) has that many steps, as evaluate.sampler.spacing 'ddim' needs; nearest "
            f"possible: {' or '.join(map(str, near))}"
        )
