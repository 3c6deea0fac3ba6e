"""The order in which images are encoded: a seeded permutation; every shard is a fair sample.

Sources are listed by class, and training reads shards one after another. Parquet files are read by
row groups, so their images are permuted in two steps: row groups to blocks of shards, then images
within a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from diffit_train.data.sources import Item, SourceKind

# Shards of a block of row groups. Each shard reads the whole block: more mix better, and read more.
BLOCK_SHARDS = 8
_IMAGES, _ROW_GROUPS = 0, 1


def encode_order(
    items: Sequence[Item], kind: SourceKind, images_per_shard: int, first_key: int
) -> np.ndarray:
    """Positions in `items`, (n,) int64, in the order in which they are encoded.

    Args:
        first_key: key of the first item; appended images get a permutation of their own.
    """
    ranks = _random(len(items), _IMAGES, first_key)
    if kind != "parquet":
        return np.argsort(ranks, kind="stable")
    groups = np.unique(
        [f"{item.location.file}:{item.location.size}" for item in items], return_inverse=True
    )[1]
    order = np.argsort(_random(int(groups.max()) + 1, _ROW_GROUPS, first_key), kind="stable")
    sizes = np.bincount(groups)[order]
    blocks = np.empty(len(order), dtype=np.int64)
    blocks[order] = (np.cumsum(sizes) - sizes) // (BLOCK_SHARDS * images_per_shard)
    return np.lexsort((ranks, blocks[groups]))


def order_digest(keys: np.ndarray) -> str:
    """SHA-256 of keys in the order of the shards."""
    return hashlib.sha256(np.ascontiguousarray(keys, dtype="<i8").tobytes()).hexdigest()


def _random(count: int, *seed: int) -> np.ndarray:
    # Raw bits and a stable sort: NumPy may change its own permutations from version to version.
    return np.random.Philox(np.random.SeedSequence(list(seed))).random_raw(count)
