"""The network as a model of diffusers; part of an exported folder, see `folder`."""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

# Replaced by the class of the recipe's network and that of its sizes.
from diffit_train.models.latent import LatentDiffiT as Network
from diffit_train.models.latent import Shape as Sizes


class DiffiTTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A trained network; parameters have the names of NVIDIA's release after `network.`.

    Args:
        sizes: fields of the network's shape.
        options: further arguments of a network of another package.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, sizes: dict, options: dict | None = None) -> None:  # type: ignore[type-arg]
        super().__init__()
        # JSON has no tuples.
        fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
        self.network = Network(Sizes(**fields), **(options or {}))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one noisy input."""
        return self.network.input_shape

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy x (B, C, h, w), noise levels t (B,), labels y (B,) to (B, O, h, w)."""
        return self.network(x, t, y)
