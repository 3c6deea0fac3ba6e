"""Choose the class of each generated image of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

# Spawn key that separates the random stream of labels from that of noise.
_STREAM = 1


def choose_labels(
    how: Literal["random", "balanced"], seed: int, indices: Sequence[int], classes: int
) -> np.ndarray:
    """Labels (n,) int64 of the images `indices`.

    random: uniform and independent, as in ADM, DiT and the published DiffiT; the label of image i
    depends on (seed, i) only. balanced: i mod classes.
    """
    if how == "balanced":
        return np.array(indices, dtype=np.int64) % classes
    return np.array([_random_label(seed, i, classes) for i in indices], dtype=np.int64)


def _random_label(seed: int, index: int, classes: int) -> int:
    entropy = np.random.SeedSequence((seed, index), spawn_key=(_STREAM,))
    return int(np.random.Generator(np.random.Philox(entropy)).integers(classes))
