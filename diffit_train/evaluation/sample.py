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
import torch
from PIL import Image
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import UserError
from diffit_train.evaluation.animation import Animation
from diffit_train.evaluation.generate import (
    Generator,
    class_names,
    file_weights,
    guidance_saving,
    load_decoder,
    run_weights,
)
from diffit_train.evaluation.grid import draw_grid
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


def choose_classes(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
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
    for text in wanted:
        if text in by_name:
            labels.append(by_name[text])
        elif text.isdigit() and int(text) < len(names):
            labels.append(int(text))
        else:
            raise UserError(
                f"--class is {text!r}, but must be a number from 0 to {len(names) - 1} or a class "
                f"name: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
            )
    return labels


@dataclass(frozen=True)
class WeightSource:
    """The weights to sample from: a checkpoint of a run, or a file; and the recipe to sample by."""

    run: Run
    step: str = NEWEST
    file: str | None = None
    allow_pickle: bool = False


def sample_images(
    source: WeightSource,
    classes: Sequence[str],
    seeds: str,
    out: str,
    batch_size: int,
    animate: bool = False,
) -> dict[str, Any]:
    """Sample images of classes and seeds into a folder; return the content of samples.json."""
    run, recipe = source.run, source.run.recipe
    if classes and not recipe.model.conditional:
        raise UserError(
            f"--class is {classes[0]!r}, but the model has no labels (model.conditional is false); "
            "remove --class"
        )
    labels, numbers = choose_classes(class_names(recipe), classes), parse_seeds(seeds)
    if source.file is not None:
        title = storage.display_path(source.file)
        weights = file_weights(recipe, source.file, source.allow_pickle)
    else:
        step = run.checkpoint(source.step).step
        title = f"{run.name}, step {step:,}, {recipe.evaluate.weights}"
        weights = run_weights(recipe, run.url, step)
    result = sample(recipe, weights, labels, numbers, out, batch_size, title, animate)
    say(f"{counted(len(result['images']), 'image')} in {storage.display_path(out)}")
    return result


def sample(
    recipe: Recipe,
    weights: dict[str, Tensor],
    labels: Sequence[int],
    seeds: Sequence[int],
    out: str,
    batch_size: int,
    title: str,
    animate: bool = False,
) -> dict[str, Any]:
    """Generate one image per class and seed: PNG files, a grid, and samples.json.

    Args:
        labels: the classes; ignored by a model without labels, which makes one image per seed.
        title: description of the weights, for the grid and samples.json.
        animate: also write the denoising as denoising.gif, as `Animation` does.
    """
    names = class_names(recipe) if recipe.model.conditional else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = Generator(recipe, weights, load_decoder(recipe, device))
    if saving := guidance_saving(recipe):
        say(saving)
    wanted = [(label, seed) for label in (labels if names else (0,)) for seed in seeds]
    animation = None
    if animate:
        if names:
            rows = [len(seeds)] * len(labels)
        else:
            rows = [min(ROW, len(seeds) - first) for first in range(0, len(seeds), ROW)]
        animation = Animation(recipe, rows, [names[label] for label in labels] if names else None)
    shown: dict[int, list[np.ndarray]] = {}
    record: list[dict[str, Any]] = []
    with Progress("sample", len(wanted), "images") as progress:
        for start in range(0, len(wanted), batch_size):
            chunk = wanted[start : start + batch_size]
            watch = animation.watcher(generator.decode) if animation else None
            keys = [(seed, 0) for _, seed in chunk]
            pixels = generator(keys, [label for label, _ in chunk], watch)
            if animation:
                animation.finish(pixels)
            for image, (label, seed) in zip(pixels, chunk, strict=True):
                name = f"class{label:04d}-seed{seed:06d}.png" if names else f"seed{seed:06d}.png"
                with storage.atomic_file(storage.join(out, name)) as path:
                    Image.fromarray(image).save(path, format="PNG")
                shown.setdefault(label if names else len(record) // ROW, []).append(image)
                of_class = {"class": names[label], "label": label} if names else {}
                record.append({"file": name, **of_class, "seed": seed})
            progress.update(start + len(chunk))
    grid = storage.join(out, "grid.png")
    sampler, guidance = recipe.evaluate.sampler, recipe.evaluate.guidance
    how = f"{sampler.name} {sampler.steps}"
    if names and guidance.kind != "none":
        how += f", guidance {guidance.title}"
    draw_grid(shown, names, f"{title}\n{how}", grid)
    result = {
        "weights": title,
        "sampler": sampler.model_dump(mode="json"),
        "guidance": guidance.model_dump(mode="json") if names else None,
        "grid": grid,
        "images": record,
    }
    if animation:
        result["animation"] = file = storage.join(out, ANIMATION)
        animation.write(file)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    storage.write_text(storage.join(out, "samples.json"), text)
    return result
