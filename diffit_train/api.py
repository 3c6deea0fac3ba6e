"""The Python surface, which `diffit_train` itself exports: trained models and latents.

What is not exported there is private and may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.autoencoder import load_autoencoder
from diffit_train.data.loader import Batch, LatentLoader, SampleOrder
from diffit_train.data.shards import load_manifest, recipe_of
from diffit_train.errors import UserError
from diffit_train.evaluation.generate import Generator, class_names, run_weights
from diffit_train.evaluation.sample import choose_classes
from diffit_train.runs.checkpoints import NEWEST
from diffit_train.runs.select import select_run


class Model:
    """The weights of a run's checkpoint, ready to sample; made by `load`.

    Attributes:
        recipe: the run's recipe, with what was changed for sampling.
        run: name of the run.
        step: step of the checkpoint.
        classes: names of the classes; empty for a model without labels.
    """

    def __init__(self, recipe: Recipe, run: str, step: int, generator: Generator) -> None:
        self.recipe, self.run, self.step = recipe, run, step
        self.classes: list[str] = class_names(recipe) if recipe.model.conditional else []
        self._generator = generator

    def __repr__(self) -> str:
        return f"<Model {self.run}, step {self.step:,}, {self.recipe.evaluate.weights}>"

    def sample(
        self,
        classes: Sequence[int | str] | None = None,
        seeds: Sequence[int] = (0,),
        batch_size: int = 16,
    ) -> np.ndarray:
        """Images of each class and seed, (classes * seeds, R, R, 3) uint8, seeds innermost.

        An image is that of `diffit sample`: it depends on its class and seed only, but for
        rounding.

        Args:
            classes: numbers or names; None for all. A model without labels has none.
            seeds: of the noise, 0 or larger.
            batch_size: images at once.

        Raises:
            UserError: there is no such class or seed.
        """
        if any(seed < 0 for seed in seeds):
            raise UserError(f"seeds are {list(seeds)}, but must be 0 or larger")
        labels = self._labels(classes)
        wanted = [(label, seed) for label in labels for seed in seeds]
        parts = []
        for start in range(0, len(wanted), batch_size):
            chunk = wanted[start : start + batch_size]
            keys = [(seed, 0) for _, seed in chunk]
            parts.append(self._generator(keys, [label for label, _ in chunk]))
        side = self.recipe.data.resolution
        return np.concatenate(parts) if parts else np.zeros((0, side, side, 3), np.uint8)

    def _labels(self, classes: Sequence[int | str] | None) -> list[int]:
        if not self.classes:
            if classes:
                raise UserError(f"classes are {list(classes)}, but the model has no labels")
            return [0]
        if classes is None:
            return list(range(len(self.classes)))
        labels = []
        for one in classes:
            if isinstance(one, str):
                labels += choose_classes(self.classes, [one])
            elif 0 <= one < len(self.classes):
                labels.append(int(one))
            else:
                raise UserError(
                    f"class is {one}, but must be a name or a number from 0 to "
                    f"{len(self.classes) - 1}"
                )
        return labels


def load(
    root: str,
    run: str | None = None,
    step: int | str = NEWEST,
    weights: str | None = None,
    changes: Sequence[str] = (),
    device: str | None = None,
) -> Model:
    """Load a trained model.

    Args:
        root: project folder or s3://bucket/prefix.
        run: name of the run; None for the only one.
        step: of the checkpoint; `newest` for the last one.
        weights: `raw`, or the name of an EMA; None for the recipe's `evaluate.weights`.
        changes: KEY=VALUE that are to differ for sampling, such as `evaluate.sampler.steps=50`.
        device: such as `cuda:1`; None for a GPU if there is one.

    Raises:
        UserError: the run, checkpoint, weights or autoencoder do not exist, or a key does not
            belong to sampling.
    """
    words = [*changes, *([f"evaluate.weights={weights}"] if weights else [])]
    chosen = select_run("sample", None, words, root, run)
    recipe, number = chosen.recipe, chosen.checkpoint(step).step
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tensors = run_weights(recipe, chosen.url, number)
    generator = Generator(recipe, tensors, load_autoencoder(recipe, place))
    return Model(recipe, chosen.name, number, generator)


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
