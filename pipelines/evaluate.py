"""Measure checkpoints of a run: the Ray job of `diffit submit evaluate`.

ray job submit --working-dir . -- python pipelines/evaluate.py RECIPE [--run RUN] [--step STEP ...]
"""

from __future__ import annotations

import diffit_train as dt
from diffit_train.cli.main import run_job


def evaluate(recipe: dt.Recipe, name: str | None, steps: list[str]) -> None:
    """Generate images from each checkpoint and compute the metrics that the recipe asks for."""
    run = dt.open_run(recipe, name)
    for result in dt.evaluate(run, steps or ["newest"]):
        print(f"step {result.step:,}: {result.metrics}, images in {result.grid}")


if __name__ == "__main__":
    run_job(evaluate)
