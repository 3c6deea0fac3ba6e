"""The typed recipe: one YAML file defines a whole run.

Every key states its unit in its name or description. Impossible combinations are rejected here,
before anything starts.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from diffit_train import storage
from diffit_train.config.autoencoder import Autoencoder
from diffit_train.config.base import Name, Section, flatten
from diffit_train.config.data import Data
from diffit_train.config.diffusion import Diffusion, Epsilon, Flow, ddim_stride
from diffit_train.config.evaluate import FREE_KEYS, SAMPLERS, Evaluate
from diffit_train.config.model import CustomModel, ImageModel, LatentModel, Model, UNetModel
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
    def _check_sizes(self) -> Self:
        data, autoencoder, model = self.data, self.autoencoder, self.model
        _divides(
            "autoencoder.downsample", autoencoder.downsample, "data.resolution", data.resolution
        )
        if isinstance(model, ImageModel | UNetModel):
            self._check_stages(model)
        elif isinstance(model, LatentModel):
            _divides("model.patch_size", model.patch_size, "the latent size", self.latent_size)
            _divides("model.num_heads", model.num_heads, "model.hidden_size", model.hidden_size)
        return self

    def _check_stages(self, model: ImageModel | UNetModel) -> None:
        """Sizes of a model on pixels."""
        resolution, kind = self.data.resolution, self.autoencoder.kind
        if kind != "identity":
            raise ValueError(
                f"model.architecture is {model.architecture!r}, which works on pixels, but "
                f"autoencoder.kind is {kind!r}; set autoencoder.kind=identity"
            )
        if isinstance(model, ImageModel):
            key, stages = "channels", len(model.channels)
        else:
            key, stages = "multipliers", len(model.multipliers)
        if resolution % 2 ** (stages - 1):
            raise ValueError(
                f"data.resolution is {resolution}, but the {stages} stages of model.{key} need a "
                f"multiple of {2 ** (stages - 1)}"
            )
        sides = [resolution >> stage for stage in range(stages)]
        if isinstance(model, ImageModel):
            for stage, side in enumerate(sides, 1):
                name = f"the resolution {side} of stage {stage}"
                _divides("model.window", model.window, name, side)
            return
        for side in model.attention_resolutions:
            if side not in sides:
                raise ValueError(
                    f"model.attention_resolutions has {side}, but the stages have "
                    f"{', '.join(map(str, sides))}"
                )

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        train, data, scaling = self.train, self.data, self.scaling
        _divides("data.shuffle_streams", data.shuffle_streams, "train.batch_size", train.batch_size)
        if scaling.max_workers > data.shuffle_streams:
            raise ValueError(
                f"scaling.workers is {scaling.workers}, but must be at most data.shuffle_streams "
                f"({data.shuffle_streams}); lower it, or raise data.shuffle_streams"
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
        if train.deterministic and self.model.attention == "flex":
            raise ValueError(
                "train.deterministic is true, but model.attention 'flex' sums the gradient of the "
                "position bias by atomic additions; set model.attention=sdpa"
            )
        if train.augment and not self.model.on_pixels:
            why = (
                "is not one of ours, which know the labels of the augmentation"
                if isinstance(self.model, CustomModel)
                else "works on latents, which cannot be augmented"
            )
            raise ValueError(
                f"train.augment is {train.augment}, but model.architecture "
                f"{self.model.architecture!r} {why}; set it to 0"
            )
        if train.warmup_steps >= train.steps:
            raise ValueError(
                f"train.warmup_steps is {train.warmup_steps}, but must be less than train.steps "
                f"({train.steps})"
            )
        return self

    @model_validator(mode="after")
    def _check_diffusion_and_evaluation(self) -> Self:
        diffusion, evaluate = self.diffusion, self.evaluate
        sampler, guidance = evaluate.sampler, evaluate.guidance
        samplers = SAMPLERS.get(diffusion.objective, ("custom",))
        if sampler.name not in samplers:
            raise ValueError(
                f"evaluate.sampler.name is {sampler.name!r}, but must be one of "
                f"{', '.join(samplers)} when diffusion.objective is {diffusion.objective!r}"
            )
        if isinstance(diffusion, Epsilon | Flow):
            if sampler.steps > diffusion.timesteps:
                raise ValueError(
                    f"evaluate.sampler.steps is {sampler.steps}, but must be at most "
                    f"diffusion.timesteps ({diffusion.timesteps})"
                )
            if sampler.name == "ddim" and sampler.spacing == "ddim":
                _check_ddim_stride(sampler.steps, diffusion.timesteps)
        weights = ("raw", *self.train.ema)
        if evaluate.reconstructed is not None:
            if not self.train.power_profiles():
                raise ValueError(
                    f"evaluate.weights is {evaluate.weights!r}, but no EMA in train.ema has a "
                    "sigma_rel to reconstruct it from"
                )
        elif evaluate.weights not in weights:
            raise ValueError(
                f"evaluate.weights is {evaluate.weights!r}, but must be one of {', '.join(weights)}"
            )
        if guidance.kind == "none":
            return self
        if guidance.channels != "all" and guidance.channels > self.autoencoder.latent_channels:
            raise ValueError(
                f"evaluate.guidance.channels is {guidance.channels}, but must be at most "
                f"autoencoder.latent_channels ({self.autoencoder.latent_channels})"
            )
        if not self.model.conditional:
            raise ValueError(
                f"evaluate.guidance.kind is {guidance.kind!r}, but must be 'none' when "
                "model.conditional is false"
            )
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
        if not self.train.augment:
            free.add("augment")
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


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise ValueError(f"{small_name} is {small}, but must divide {large_name} ({large})")


def _check_ddim_stride(steps: int, timesteps: int) -> None:
    if ddim_stride(timesteps, steps) is not None:
        return
    possible = [n for n in range(1, timesteps + 1) if ddim_stride(timesteps, n) is not None]
    nearest = [*[n for n in possible if n < steps][-1:], *[n for n in possible if n > steps][:1]]
    raise ValueError(
        f"evaluate.sampler.steps is {steps}, but no integer stride through diffusion.timesteps "
        f"({timesteps}) has that many steps, as evaluate.sampler.spacing 'ddim' needs; nearest "
        f"possible: {' or '.join(map(str, nearest))}"
    )
