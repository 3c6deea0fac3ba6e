"""A rank's share of a global batch, with all of its randomness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffit_train.config import Recipe
from diffit_train.data.augment import Resampling, draw_augmentation, joined_augmentation
from diffit_train.data.autoencoder import sample_latent
from diffit_train.data.loader import Batch
from diffit_train.data.manifest import Manifest
from diffit_train.data.randomness import AUGMENTATION, DROPOUT, SAMPLE, generator
from diffit_train.diffusion.objective import Objective


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's input to a step: n samples of the global batch.

    Attributes:
        source: the samples as read from the shards.
        x0: scaled latents, (n, C, h, w).
        t: noise levels, (n,).
        noise: same shape as `x0`.
        y: labels, (n,); the null class where dropped.
        extras: what only some networks take, by name: labels of the augmentation (n, 9) and seeds
            of dropout (n,).
        augmentation: what the device does to `x0` first, which would keep a CPU busy; None if
            nothing.
    """

    source: Batch
    x0: Tensor
    t: Tensor
    noise: Tensor
    y: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    augmentation: Resampling | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0, t, noise, y)."""
        return self.x0, self.t, self.noise, self.y


class Draws(NamedTuple):
    """The randomness of a stream's n samples in a step."""

    t: np.ndarray  # (n,), noise levels
    noise: np.ndarray  # (n, C, h, w) float32
    posterior: np.ndarray  # (n, C, h, w) float32, noise of the autoencoder's posterior
    flip: np.ndarray  # (n,) int64, which of the F frames
    drop: np.ndarray  # (n,) bool, whether the label is dropped


class BatchBuilder:
    """Draws noise levels, noise, posterior samples, flips and label dropout, stream by stream.

    Called by the loader's thread; the result depends only on the seed, the step and the streams.
    """

    def __init__(
        self, recipe: Recipe, manifest: Manifest, objective: Objective, device: torch.device
    ) -> None:
        self.recipe, self.manifest, self.objective = recipe, manifest, objective
        self.device = device

    def draw(self, step: int, stream: int, count: int) -> Draws:
        """Draw for `count` samples of a stream."""
        random = generator(self.recipe.train.seed, SAMPLE, step, stream)
        shape = (count, self.manifest.channels, self.manifest.height, self.manifest.width)
        return Draws(
            self.objective.draw(random, count),
            random.standard_normal(shape, dtype=np.float32),
            random.standard_normal(shape, dtype=np.float32),
            random.integers(self.manifest.frames, size=count),
            random.random(count) < self.recipe.train.label_dropout,
        )

    def __call__(self, batch: Batch) -> TrainingBatch:
        """Turn a batch of samples into a training batch."""
        manifest, train = self.manifest, self.recipe.train
        count = len(batch.labels) // len(batch.streams)
        draws = zip(*[self.draw(batch.step, n, count) for n in batch.streams], strict=True)
        t, noise, posterior, flip, drop = (torch.from_numpy(np.concatenate(d)) for d in draws)
        moments = torch.from_numpy(batch.moments)[torch.arange(len(batch.labels)), flip]
        x0 = sample_latent(moments, posterior, manifest.scale)
        labels = torch.from_numpy(batch.labels)
        y = torch.where(drop, self.recipe.data.num_classes, labels)
        extras, augmentation = {}, None
        if train.augment:
            drawn = [
                draw_augmentation(
                    generator(train.seed, AUGMENTATION, batch.step, stream), count, train.augment
                )
                for stream in batch.streams
            ]
            joint = joined_augmentation(drawn)
            extras["augment"] = torch.from_numpy(joint.labels)
            augmentation = Resampling.of(joint, manifest.height)
        if self.recipe.model.dropout:
            seeds = [
                generator(train.seed, DROPOUT, batch.step, stream).integers(2**31, size=count)
                for stream in batch.streams
            ]
            extras["dropout_seeds"] = torch.from_numpy(np.concatenate(seeds))
        tensors = (x0, t, noise, y)
        if self.device.type == "cuda":
            tensors = tuple(v.pin_memory() for v in tensors)  # type: ignore[assignment]
            extras = {name: v.pin_memory() for name, v in extras.items()}
            augmentation = augmentation.pin_memory() if augmentation else None
        return TrainingBatch(batch, *tensors, extras, augmentation)
