"""The interface of every trained network to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """A network that maps noisy input, noise level and label to a prediction.

    Attributes:
        blocks: the repeated blocks, in order; units of compilation and activation checkpointing.
    """

    blocks: nn.ModuleList

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one noisy input."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """What the network's size follows from, as plain values."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """The main sizes in a few words."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy x (B, C, h, w), noise level t (B,), labels y (B,) to (B, O, h, w)."""


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that the optimizer updates."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
