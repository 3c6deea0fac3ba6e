"""Train a run: the Ray job of `diffit submit train`.

ray job submit --working-dir . -- python pipelines/train.py RECIPE [KEY=VALUE ...] [--run RUN]
"""

from __future__ import annotations

import diffit_train as dt
from diffit_train.cli.main import run_job


def train(recipe: dt.Recipe, name: str | None, steps: list[str]) -> None:
    """Train on the latents from the newest checkpoint to the recipe's last step."""
    run = dt.train(recipe, name)
    print(f"checkpoints at steps {run.checkpoints.steps}, MLflow run {run.mlflow_run_id}")


if __name__ == "__main__":
    run_job(train)
