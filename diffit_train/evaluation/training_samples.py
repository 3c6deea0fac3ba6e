"""Grids of fixed seeds that show a run while it trains (`train.sample_every`).

The process that started the training draws them on its CPU, from committed checkpoints. So they
touch neither the workers' random numbers nor their devices, and no rank waits for them. A grid that
exists is not drawn again; MLflow gets the ones that it lacks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import torch
from PIL import Image

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.evaluate import Ddim, PlainSampler, Sampler
from diffit_train.data.autoencoder import LoadedAutoencoder
from diffit_train.evaluation.generate import Generator, class_names, load_decoder, run_weights
from diffit_train.evaluation.grid import draw_grid, in_rows
from diffit_train.evaluation.sample import ROW, choose_classes, sample_rows
from diffit_train.runs.run import Run
from diffit_train.tracking import Tracker, unreachable_errors

# Sampling steps at most, images of a class, and images of a model without labels.
STEPS, SEEDS, UNLABELED = 20, 4, 2 * ROW
# Name of the images in MLflow.
KEY = "samples"
# Note in the folder that MLflow lacks some of the grids.
_UNSENT = "unsent"


def quick_recipe(recipe: Recipe) -> Recipe:
    """The recipe that grids are drawn by: an EMA, few steps, in fp32."""
    evaluate, sampler = recipe.evaluate, _quick_sampler(recipe.evaluate.sampler)
    known = (evaluate.weights, *recipe.train.ema, "raw")
    weights = next(name for name in known if name == "raw" or name in recipe.train.ema)
    changed = {"sampler": sampler, "weights": weights, "compile": False, "precision": "fp32"}
    return recipe.model_copy(update={"evaluate": evaluate.model_copy(update=changed)})


def _quick_sampler(sampler: Sampler) -> Sampler:
    """The sampler with few steps, or one that needs fewer."""
    steps = min(STEPS, sampler.steps)
    if sampler.name in ("ddpm", "ddim"):
        return Ddim(steps=steps)
    if sampler.name == "sde":
        return PlainSampler(name="euler", steps=steps)
    return sampler.model_copy(update={"steps": steps})


class TrainingSamples:
    """The grids of a run, in its folder `samples`."""

    def __init__(self, run: Run) -> None:
        self.recipe, self.run = quick_recipe(run.recipe), run
        self.url = storage.join(run.url, KEY)
        self._decoder: LoadedAutoencoder | None = None

    def drawn(self) -> set[int]:
        """Steps whose grid exists."""
        names = (re.fullmatch(r"step-(\d+)\.png", name) for name in storage.list_names(self.url))
        return {int(found[1]) for found in names if found}

    def due(self, steps: Iterable[int]) -> list[int]:
        """Those of the checkpoints at `steps` whose grid is to be drawn, ascending.

        It is the first one at or after each multiple of `train.sample_every`.
        """
        every = self.recipe.train.sample_every
        assert every is not None
        later = sorted(step for step in steps if step >= every)
        taken = {step // every for step in self.drawn()} if later else set()
        first = {step // every: step for step in reversed(later)}
        return sorted(step for number, step in first.items() if number not in taken)

    def draw(self, step: int) -> None:
        """Draw the grid of a checkpoint.

        Raises:
            DiffitError: the checkpoint or the autoencoder cannot be read.
        """
        recipe = self.recipe
        if self._decoder is None:
            self._decoder = load_decoder(recipe, torch.device("cpu"))
        generator = Generator(recipe, run_weights(recipe, self.run.url, step), self._decoder)
        count = SEEDS if recipe.model.conditional else UNLABELED
        rows, names = sample_rows(recipe, choose_classes(class_names(recipe), []), range(count))
        wanted = [pair for row in rows for pair in row]
        images = in_rows(generator.images(wanted, len(wanted)), [len(row) for row in rows])
        sampler, weights = recipe.evaluate.sampler, recipe.evaluate.weights
        title = f"{self.run.name}, step {step:,}, {weights}\n{sampler.name} {sampler.steps}"
        draw_grid(images, names, title, self._file(step))

    def send(self, mlflow_run_id: str) -> None:
        """Log the grids that the MLflow run lacks.

        Raises:
            unreachable_errors: MLflow is unreachable; a note stays for `send_unsent`.
        """
        mark = storage.join(self.url, _UNSENT)
        try:
            tracker = Tracker.of(self.recipe)
            for step in sorted(self.drawn() - tracker.image_steps(mlflow_run_id, KEY)):
                image = Image.open(io.BytesIO(storage.read_bytes(self._file(step))))
                tracker.log_image(mlflow_run_id, image, KEY, step)
        except unreachable_errors():
            storage.write_text(mark, "")
            raise
        storage.remove(mark)

    def send_unsent(self) -> None:
        """Log what MLflow lacked when training ended; errors as `send`."""
        if self.run.checkpoints and storage.exists(storage.join(self.url, _UNSENT)):
            self.send(self.run.mlflow_run_id)

    def _file(self, step: int) -> str:
        return storage.join(self.url, f"step-{step:010d}.png")
