"""The random streams of training, all numbered here: each use of a recipe's seed has its own."""

from __future__ import annotations

import numpy as np

# Keys after the use: SHARD_ORDER (epoch), WINDOW (epoch, stream, number of the window),
# SAMPLE, AUGMENTATION and DROPOUT (step, stream). SAMPLE draws the noise level, the noise, the
# posterior's sample, the flip and the label's dropout.
SHARD_ORDER, WINDOW, SAMPLE, AUGMENTATION, DROPOUT = range(5)


def generator(*key: int) -> np.random.Generator:
    """The generator of a key: the seed, the use, and where in training it is used."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))
