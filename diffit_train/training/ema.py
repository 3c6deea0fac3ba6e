"""Exponential moving average of the fp32 master weights, sharded exactly as they are."""

from __future__ import annotations

import torch
from torch import Tensor


class ShardedEMA:
    """An average of flat tensors: ema <- decay * ema + (1 - decay) * weights, in fp32.

    Each rank averages only the partition of the master weights that ZeRO gave it, so no rank
    ever holds a whole copy, and the pieces together equal the average of the whole weights.

    Args:
        sources: this rank's flat fp32 partitions, one for each parameter group.
        decay: weight of the past, in [0, 1).
    """

    def __init__(self, sources: list[Tensor], decay: float) -> None:
        self.sources = sources
        self.decay = decay
        self.averages = [source.detach().clone() for source in sources]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for average, source in zip(self.averages, self.sources, strict=True):
            average.lerp_(source, 1.0 - self.decay)
