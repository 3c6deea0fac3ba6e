"""A trained model in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffit_train.config import Recipe
from diffit_train.data.autoencoder import load_autoencoder
from diffit_train.errors import UserError
from diffit_train.evaluation.generate import Generator, class_names, run_weights
from diffit_train.evaluation.sample import choose_classes
from diffit_train.runs.run import Run


class Model:
    """The weights of a run's checkpoint, ready to sample.

    Args:
        run: with the recipe to sample by.
        step: of the checkpoint.
        device: such as `cuda:1`; None for a GPU if there is one.

    Attributes:
        recipe: the run's recipe, with what was changed for sampling.
        run: name of the run.
        step: step of the checkpoint.
        classes: names of the classes; empty for a model without labels.
    """

    def __init__(self, run: Run, step: int, device: str | None = None) -> None:
        recipe: Recipe = run.recipe
        self.recipe, self.run, self.step = recipe, run.name, step
        self.classes: list[str] = class_names(recipe) if recipe.model.conditional else []
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        weights = run_weights(recipe, run.url, step)
        self._generator = Generator(recipe, weights, load_autoencoder(recipe, place))

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
