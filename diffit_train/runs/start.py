"""To be replaced by `open_run`."""

from __future__ import annotations

from diffit_train.config import Recipe
from diffit_train.runs.run import open_run


def init_from(recipe: Recipe, run: str, source: str | None = None, weights: str = "ema") -> Recipe:
    """The recipe with `train.start` filled in."""
    return open_run(recipe, run, source, weights).recipe
