"""From ImageNet's images to its FID: the Ray job of `diffit submit pipeline`, for any recipe.

ray job submit --working-dir . -- python pipelines/imagenet.py imagenet256 --root s3://bucket/project
"""

from __future__ import annotations

import diffit_train as dt
from diffit_train.cli.main import run_job


def imagenet(recipe: dt.Recipe, name: str | None, steps: list[str]) -> None:
    """Encode, compute references, train and evaluate; skip what is finished."""
    print("pipeline: stage 1 of 4, encode")
    dt.encode(recipe)
    print("pipeline: stage 2 of 4, references")
    dt.compute_references(recipe)
    print("pipeline: stage 3 of 4, train")
    run = dt.train(recipe, name)
    print("pipeline: stage 4 of 4, evaluate")
    for result in dt.evaluate(run, steps or ["newest"]):
        print(f"step {result.step:,}: {result.metrics}")
    print("pipeline: all 4 stages are done")


if __name__ == "__main__":
    run_job(imagenet)
