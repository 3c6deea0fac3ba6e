"""Encode images to shards of latents: the Ray job of `diffit submit encode`.

ray job submit --working-dir . -- python pipelines/encode.py RECIPE [KEY=VALUE ...]
"""

from __future__ import annotations

import diffit_train as dt
from diffit_train.cli.main import run_job


def encode(recipe: dt.Recipe, name: str | None, steps: list[str]) -> None:
    """Encode what is not encoded yet, on all nodes of the job's cluster."""
    manifest = dt.encode(recipe)
    print(f"{manifest.totals}; mean of the channels {manifest.mean}, deviation {manifest.std}")


if __name__ == "__main__":
    run_job(encode)
