"""The interface of every trained network to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class NetworkShape:
    """What a network gets and returns.

    Attributes:
        input_shape: (C, h, w) of one noisy input, latents or pixels.
        out_channels: O; 2C if the variance is learned.
        num_classes: number of classes, label `num_classes` being the null class; None for an
            unconditional network, which ignores labels.
    """

    input_shape: tuple[int, int, int]
    out_channels: int
    num_classes: int | None


class Backbone(nn.Module, ABC):
    """A network that maps noisy input, noise level and label to a prediction.

    A network of another package is made as `Network(NetworkShape(…), **options)`, with the
    recipe's `model.options`. Its weights are its parameters: buffers must be computed, and
    registered with `persistent=False`. All parameters must take part in every forward pass.

    Attributes:
        blocks: the repeated blocks, in order; units of compilation and activation checkpointing.
    """

    blocks: nn.ModuleList

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one noisy input."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What the network's size follows from, as plain values."""
        return {"depth": len(self.blocks)}

    @property
    def summary(self) -> str:
        """The main sizes in a few words."""
        return f"{len(self.blocks)} blocks"

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy x (B, C, h, w), noise level t (B,), labels y (B,) to (B, O, h, w)."""


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that the optimizer updates."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
