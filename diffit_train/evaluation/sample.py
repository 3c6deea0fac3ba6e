"""`diffit sample`: images of chosen classes and seeds, from any weights, on this machine.

A model without labels makes one image per seed. An image depends only on its seed and class, not on
the batch size or the other images (except for rounding).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import UserError
from diffit_train.evaluation.generate import (
    Generator,
    class_names,
    file_weights,
    guidance_saving,
    run_weights,
)
from diffit_train.evaluation.grid import Animation, draw_grid, in_rows
from diffit_train.progress import Progress, counted, say
from diffit_train.runs.checkpoints import NEWEST
from diffit_train.runs.run import Run

# Maximum number of classes without --class, evenly spaced.
DEFAULT_CLASSES = 8
ANIMATION = "denoising.gif"
# Images in a row of the grid of a model without labels.
ROW = 10


def parse_seeds(text: str) -> list[int]:
    """Parse `0-3,8` into [0, 1, 2, 3, 8].

    Raises:
        UserError: the text is not a list of numbers and ranges.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--seeds is {text!r}, but must be numbers and ranges, such as 0-3,8")
        if dash and int(last) < int(first):
            raise UserError(
                f"--seeds has {part.strip()!r}, but a range must not end before it starts"
            )
        seeds += range(int(first), int(last if dash else first) + 1)
    return seeds


def choose_classes(names: Sequence[str], wanted: Sequence[int | str]) -> list[int]:
    """Labels of classes given by name or number; evenly spaced ones if none is given.

    Names take precedence over numbers: class `7` of the digits is the class named `7`.

    Raises:
        UserError: there is no such class.
    """
    if not wanted:
        spread = np.linspace(0, len(names) - 1, min(len(names), DEFAULT_CLASSES))
        return [int(label) for label in spread]
    by_name = {name: label for label, name in enumerate(names)}
    labels = []
    for given in wanted:
        label = by_name.get(given, given) if isinstance(given, str) else given
        if isinstance(label, str):
            label = int(label) if label.isdigit() else -1
        if not 0 <= label < len(names):
            raise UserError(
                f"class is {given!r}, but must be a number from 0 to {len(names) - 1} or a class "
                f"name: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
            )
        labels.append(int(label))
    return labels


def sample_rows(
    recipe: Recipe, labels: Sequence[int], seeds: Sequence[int]
) -> tuple[list[list[tuple[int, int]]], list[str] | None]:
    """Label and seed of each image of a grid, row by row; and the names of the rows.

    A row is a class; of a model without labels, which makes one image per seed, it is `ROW` images.
    """
    if recipe.model.conditional:
        names = class_names(recipe)
        rows = [[(label, seed) for seed in seeds] for label in labels]
        return rows, [names[label] for label in labels]
    return [[(0, seed) for seed in seeds[n : n + ROW]] for n in range(0, len(seeds), ROW)], None


@dataclass(frozen=True)
class WeightSource:
    """The weights to sample from: a checkpoint of a run, or a file; and the recipe to sample by."""

    run: Run
    step: str = NEWEST
    file: str | None = None
    allow_pickle: bool = False

    def load(self) -> tuple[Generator, str]:
        """The model, and a description of its weights."""
        run, recipe = self.run, self.run.recipe
        if self.file is not None:
            weights = file_weights(recipe, self.file, self.allow_pickle)
            return Generator.load(recipe, weights), storage.display_path(self.file)
        step = run.checkpoint(self.step).step
        generator = Generator.load(recipe, run_weights(recipe, run.url, step))
        return generator, f"{run.name}, step {step:,}, {recipe.evaluate.weights}"


def sample_images(
    source: WeightSource,
    classes: Sequence[str],
    seeds: str,
    out: str,
    batch_size: int,
    animate: bool = False,
) -> dict[str, Any]:
    """Sample one image per class and seed into a folder: PNG files, a grid, and samples.json.

    Args:
        animate: also write the denoising as denoising.gif, as `Animation` does.

    Returns:
        The content of samples.json.
    """
    recipe = source.run.recipe
    labeled = recipe.model.conditional
    if classes and not labeled:
        raise UserError(
            f"--class is {classes[0]!r}, but the model has no labels (model.conditional is false); "
            "remove --class"
        )
    known = class_names(recipe)
    rows, names = sample_rows(recipe, choose_classes(known, classes), parse_seeds(seeds))
    wanted, counts = [pair for row in rows for pair in row], [len(row) for row in rows]
    generator, title = source.load()
    if saving := guidance_saving(recipe):
        say(saving)
    animation = Animation(recipe, counts, names) if animate else None
    images: list[np.ndarray] = []
    record: list[dict[str, Any]] = []
    with Progress("sample", len(wanted), "images") as progress:
        generated = generator.images(wanted, batch_size, animation)
        for (label, seed), image in zip(wanted, generated, strict=True):
            file = f"class{label:04d}-seed{seed:06d}.png" if labeled else f"seed{seed:06d}.png"
            with storage.atomic_file(storage.join(out, file)) as path:
                Image.fromarray(image).save(path, format="PNG")
            images.append(image)
            of_class = {"class": known[label], "label": label} if labeled else {}
            record.append({"file": file, **of_class, "seed": seed})
            progress.update(len(images))
    grid = storage.join(out, "grid.png")
    sampler, guidance = recipe.evaluate.sampler, recipe.evaluate.guidance
    settings = f"{sampler.name} {sampler.steps}"
    if labeled and guidance.kind != "none":
        settings += f", guidance {guidance.title}"
    draw_grid(in_rows(images, counts), names, f"{title}\n{settings}", grid)
    result = {
        "weights": title,
        "sampler": sampler.model_dump(mode="json"),
        "guidance": guidance.model_dump(mode="json") if labeled else None,
        "grid": grid,
        "images": record,
    }
    if animation:
        result["animation"] = file = storage.join(out, ANIMATION)
        animation.write(file)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    storage.write_text(storage.join(out, "samples.json"), text)
    say(f"{counted(len(record), 'image')} in {storage.display_path(out)}")
    return result


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
        self._generator = Generator.load(recipe, run_weights(recipe, run.url, step), device)

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
        wanted = [(label, seed) for label in self._labels(classes) for seed in seeds]
        images, side = list(self._generator.images(wanted, batch_size)), self.recipe.data.resolution
        return np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8)

    def _labels(self, classes: Sequence[int | str] | None) -> list[int]:
        if not self.classes:
            if classes:
                raise UserError(f"classes are {list(classes)}, but the model has no labels")
            return [0]
        if classes is None:
            return list(range(len(self.classes)))
        return choose_classes(self.classes, classes) if classes else []
