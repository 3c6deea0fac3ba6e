"""Encoded images as a dataset of torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from diffit_train import storage
from diffit_train.data.loader import Batch, LatentLoader, SampleOrder
from diffit_train.data.manifest import load_manifest, recipe_of
from diffit_train.errors import UserError


class LatentBatch(NamedTuple):
    """A batch of encoded images.

    Attributes:
        step: of training, from 0.
        moments: (n, F, 2C, h, w) float32: the posterior's mean, then its log-variance, unscaled,
            or pixels; F is 2 with the horizontal flip.
        labels: (n,) int64.
        keys: (n,) int64, indices of the images in the sorted input.
    """

    step: int
    moments: Tensor
    labels: Tensor
    keys: Tensor


class Latents(IterableDataset[LatentBatch]):
    """The batches that training sees, in its exact order, without end.

    Yields batches, so wrap it in `DataLoader(latents, batch_size=None)`. Several workers of a
    DataLoader, and several ranks, share each batch as the ranks of a training do: by streams.

    Args:
        url: folder of the latents, ROOT/latents/NAME.
        batch_size: global; None for that of the recipe that encoded them.
        seed: of the order; None for the recipe's `train.seed`.
        start_step: the first step.
        rank: of this process.
        world: number of processes.

    Raises:
        UserError: there are no finished latents, or fewer samples than a batch needs.
    """

    def __init__(
        self,
        url: str,
        batch_size: int | None = None,
        seed: int | None = None,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.url = storage.absolute(url)
        self.manifest, recipe = load_manifest(self.url), recipe_of(self.url)
        self.start_step, self.rank, self.world = start_step, rank, world
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, but must be at least 1")
        self._new_order = partial(SampleOrder.of, recipe, self.manifest, batch_size, seed)
        self.steps_per_epoch = self._new_order().steps_per_epoch

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.manifest.classes)

    def __iter__(self) -> Iterator[LatentBatch]:
        info, rank, world = get_worker_info(), self.rank, self.world
        if info is not None:
            rank, world = rank * info.num_workers + info.id, world * info.num_workers
        order = self._new_order()
        streams = order.rank_streams(rank, world)
        with LatentLoader(
            self.url, self.manifest, order, streams, self.start_step, _as_tensors
        ) as loader:
            yield from loader


def _as_tensors(batch: Batch) -> LatentBatch:
    return LatentBatch(
        batch.step,
        torch.from_numpy(batch.moments),
        torch.from_numpy(batch.labels.astype(np.int64)),
        torch.from_numpy(batch.keys.astype(np.int64)),
    )
