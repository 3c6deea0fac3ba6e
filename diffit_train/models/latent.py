"""The latent DiffiT (paper section 3.2, appendix I.2), with the names of the published weights.

Shapes: B images, C latent channels, O output channels, h x w latent pixels, N tokens, D hidden
size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from diffit_train.models.attention import TMSA
from diffit_train.models.backbone import Backbone
from diffit_train.models.layers import (
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    layer_norm,
    sincos_position_table,
    unpatchify,
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a latent transformer.

    Attributes:
        latent_size: side of the square latent, h = w; a multiple of `patch_size`.
        latent_channels: C.
        out_channels: O; 2C where the variance is learned.
        num_classes: classes of the data, where label `num_classes` is the null class; None for
            a model without labels.
        label_init_std: standard deviation of the label table at the start (0.02 as published).
        position_side: side of the token grid over which the fixed positions spread; None: its own.

    Raises:
        ValueError: sizes that do not divide.
    """

    latent_size: int = 32
    latent_channels: int = 4
    out_channels: int = 8
    num_classes: int | None = 1000
    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    label_init_std: float = 0.02
    position_side: int | None = None

    def __post_init__(self) -> None:
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"patch size {self.patch_size} does not divide latent size {self.latent_size}"
            )

    @property
    def side(self) -> int:
        """Tokens in a row."""
        return self.latent_size // self.patch_size


class LatentTransformer(Backbone):
    """Embed patches, time and label; run blocks; project tokens back to patches.

    A subclass says what a block and the last layer are; both are called with (x, c). Under bf16
    weights the latents must still come in fp32: patches and positions are embedded in fp32, and
    the tokens are rounded for the first block.
    """

    pos_embed: Tensor  # (1, N, D), fixed, never narrower than fp32

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.hidden_size
        self.x_embedder = PatchEmbed(shape.latent_channels, shape.patch_size, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = (
            None
            if shape.num_classes is None
            else LabelEmbedder(shape.num_classes, width, shape.label_init_std)
        )
        table = sincos_position_table(width, shape.side, shape.position_side)
        # A buffer, since DeepSpeed rounds every parameter to bf16, learned or not.
        self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList([self.make_block(shape) for _ in range(shape.depth)])
        self.final_layer = self.make_final_layer(shape)
        for module in [*self.blocks.modules(), *self.final_layer.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.zero_initialise()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of noisy latents."""
        return self.shape.latent_channels, self.shape.latent_size, self.shape.latent_size

    @abstractmethod
    def make_block(self, shape: Shape) -> nn.Module:
        """A transformer block, called with tokens (B, N, D) and conditioning (B, D)."""

    @abstractmethod
    def make_final_layer(self, shape: Shape) -> nn.Module:
        """From tokens (B, N, D) and conditioning (B, D) to (B, N, patch_size^2 * O)."""

    @abstractmethod
    def zero_initialise(self) -> None:
        """Set to zero what must be so at the start."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and the like come down to; the positions are moved but not rounded."""
        table = self.pos_embed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.pos_embed.dtype.itemsize < 4:
            self.pos_embed = table.to(self.pos_embed.device, torch.float32)
        return self

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents x (B, C, h, w), timesteps t (B,), labels y (B,) to (B, O, h, w).

        With a learned variance the first C channels are the predicted noise, the last C the
        variance interpolation. A model without labels takes no notice of y.
        """
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        x = x.to(next(self.blocks.parameters()).dtype)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.shape.patch_size, self.shape.out_channels)


class Block(nn.Module):
    """x + TMSA(LN(x), c), then x + MLP(LN(x)): equations 7 and 8."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, side: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = TMSA(hidden_size, num_heads, side)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and conditioning c (B, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x), c)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """LayerNorm, SiLU (or none), and a projection of each token to its patch."""

    def __init__(self, shape: Shape, silu: bool) -> None:
        super().__init__()
        self.norm = layer_norm(shape.hidden_size)
        self.act = nn.SiLU() if silu else nn.Identity()
        self.linear = nn.Linear(shape.hidden_size, shape.patch_size**2 * shape.out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) to (B, N, patch_size^2 * O); time and label have no part in it."""
        return self.linear(self.act(self.norm(x)))


class LatentDiffiT(LatentTransformer):
    """The paper's model; at its default shape the 561M of the published weights for 256x256."""

    def make_block(self, shape: Shape) -> nn.Module:
        """A DiffiT block."""
        return Block(shape.hidden_size, shape.num_heads, shape.mlp_ratio, shape.side)

    def make_final_layer(self, shape: Shape) -> nn.Module:
        """With SiLU, as published."""
        return FinalLayer(shape, silu=True)

    def zero_initialise(self) -> None:
        """The first prediction is zero whatever the input, as in DiT."""
        nn.init.zeros_(self.final_layer.get_parameter("linear.weight"))
