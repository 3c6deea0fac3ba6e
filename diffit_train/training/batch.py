"""A rank's share of a global batch, with all of its randomness."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffit_train.config import Recipe
from diffit_train.data.augment import Resampling, draw_augmentation, joined_augmentation
from diffit_train.data.autoencoder import sample_latent
from diffit_train.data.loader import Batch, draw
from diffit_train.data.manifest import Manifest
from diffit_train.data.randomness import AUGMENTATION, DROPOUT, generator
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


class BatchBuilder:
    """Draws noise levels, noise, posterior samples, flips and label dropout, stream by stream.

    Called by the loader's thread; the result depends only on the seed, the step and the streams.
    """

    def __init__(
        self, recipe: Recipe, manifest: Manifest, objective: Objective, device: torch.device
    ) -> None:
        self.recipe, self.manifest, self.objective = recipe, manifest, objective
        self.device = device

    def __call__(self, batch: Batch) -> TrainingBatch:
        """Turn a batch of samples into a training batch."""
        manifest, train = self.manifest, self.recipe.train
        count = len(batch.labels) // len(batch.streams)
        shape = (manifest.channels, manifest.height, manifest.width)
        streams = [
            draw(
                train.seed,
                batch.step,
                stream,
                count,
                shape,
                manifest.frames,
                self.objective.draw,
                train.label_dropout,
            )
            for stream in batch.streams
        ]

        def joined(name: str) -> Tensor:
            return torch.cat([torch.from_numpy(getattr(stream, name)) for stream in streams])

        moments = torch.from_numpy(batch.moments)[torch.arange(len(batch.labels)), joined("flip")]
        x0 = sample_latent(moments, joined("posterior"), manifest.scale)
        labels = torch.from_numpy(batch.labels)
        y = torch.where(joined("drop"), self.recipe.data.num_classes, labels)
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
        tensors = (x0, joined("t"), joined("noise"), y)
        if self.device.type == "cuda":
            tensors = tuple(v.pin_memory() for v in tensors)  # type: ignore[assignment]
            extras = {name: v.pin_memory() for name, v in extras.items()}
            augmentation = augmentation.pin_memory() if augmentation else None
        return TrainingBatch(batch, *tensors, extras, augmentation)
