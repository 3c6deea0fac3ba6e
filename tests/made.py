"""Latents, manifests and checkpoint states as encoding and training leave them, without either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffit_train.data.manifest import Manifest, ShardEntry, Totals
from diffit_train.data.shards import write_shard
from diffit_train.runs.checkpoints import State


def make_shards(url: str, counts: Sequence[int]) -> list[ShardEntry]:
    """Shards of random latents of two 2x2 channels; key k has label k % 3."""
    random = np.random.default_rng(0)
    shards, first = [], 0
    for number, count in enumerate(counts):
        keys = list(range(first, first + count))
        moments = random.normal(size=(count, 1, 4, 2, 2)).astype(np.float16)
        shards.append(write_shard(url, number, keys, moments, [k % 3 for k in keys]))
        first += count
    return shards


def make_manifest(
    shards: list[ShardEntry], channels: int = 2, side: int = 2, **changes: Any
) -> Manifest:
    """The manifest of these shards."""
    images = sum(shard.count for shard in shards)
    values: dict[str, Any] = {
        "schema_version": 1,
        "recipe_hash": "h",
        "autoencoder": "a",
        "autoencoder_sha256": "s",
        "scale": 1.0,
        "channels": channels,
        "height": side,
        "width": side,
        "frames": 1,
        "images_per_shard": max((shard.count for shard in shards), default=1),
        "segments": [images],
        "orders": ["sha256"],
        "classes": ["a", "b", "c"],
        "input_sha256": "i",
        "shards": shards,
        "totals": Totals(input=images, written=images, rejected=0),
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
    }
    return Manifest(**(values | changes))


def make_state(step: int, **changes: Any) -> State:
    """The state of a checkpoint at a step, of batches of eight images."""
    values: dict[str, Any] = {
        "step": step,
        "images_seen": 8 * step,
        "optimizer_steps": step,
        "recipe_hash": "h",
        "mlflow_run_id": "none",
        "world_size": 1,
        "zero_stage": 0,
    }
    return State(**(values | changes))
