"""The latent DiffiT (paper section 3.2, appendix I.2), with the names of the published weights.

Shapes: B images, C latent channels, O output channels, h x w latent pixels, N tokens, D hidden
size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

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
        out_channels: O; 2C if the variance is learned.
        num_classes: number of classes, label `num_classes` being the null class; None for an
            unconditional model.
        label_init_std: initial standard deviation of the label table (published: 0.02).
        position_side: side of the token grid that the fixed positions range over; None for the
            model's own.

    Raises:
        ValueError: latent size is not a multiple of patch size.
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
        """Tokens per row."""
        return self.latent_size // self.patch_size


class LatentTransformer(Backbone):
    """Embed patches, time and label; run blocks; project tokens back to patches.

    Subclasses define the block and the final layer; both are called with (x, c). With bf16 weights
    the latents must still be fp32: patches and positions are embedded in fp32, and only the tokens
    are rounded, before the first block.
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
        # A buffer, because DeepSpeed casts every parameter to bf16, trainable or not.
        self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList([self.make_block(shape) for _ in range(shape.depth)])
        self.final_layer = self.make_final_layer(shape)
        for module in [*self.blocks.modules(), *self.final_layer.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.zero_initialize()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of noisy latents."""
        return self.shape.latent_channels, self.shape.latent_size, self.shape.latent_size

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields of `Shape`."""
        return asdict(self.shape)

    @property
    def summary(self) -> str:
        """Width, depth, heads and tokens."""
        shape = self.shape
        return (
            f"width {shape.hidden_size}, depth {shape.depth}, {shape.num_heads} heads, "
            f"{shape.side**2} tokens"
        )

    @abstractmethod
    def make_block(self, shape: Shape) -> nn.Module:
        """Build a transformer block, called with tokens (B, N, D) and conditioning (B, D)."""

    @abstractmethod
    def make_final_layer(self, shape: Shape) -> nn.Module:
        """Build a layer from tokens (B, N, D), conditioning (B, D) to (B, N, patch_size^2 * O)."""

    @abstractmethod
    def zero_initialize(self) -> None:
        """Zero the weights that must start at zero."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by `to`, `half`, etc.; moves the positions but never rounds them."""
        table = self.pos_embed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.pos_embed.dtype.itemsize < 4:
            self.pos_embed = table.to(self.pos_embed.device, torch.float32)
        return self

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents x (B, C, h, w), timesteps t (B,), labels y (B,) to (B, O, h, w).

        With a learned variance the first C channels are the predicted noise, the last C the
        variance interpolation. An unconditional model ignores y.
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
        """(B, N, D) to (B, N, patch_size^2 * O); c is not used."""
        return self.linear(self.act(self.norm(x)))


class LatentDiffiT(LatentTransformer):
    """The paper's model; the default shape is that of the published 561M weights for 256x256."""

    def make_block(self, shape: Shape) -> nn.Module:
        """A DiffiT block."""
        return Block(shape.hidden_size, shape.num_heads, shape.mlp_ratio, shape.side)

    def make_final_layer(self, shape: Shape) -> nn.Module:
        """The published final layer, with SiLU."""
        return FinalLayer(shape, silu=True)

    def zero_initialize(self) -> None:
        """Zero the last projection, so that the initial prediction is zero, as in DiT."""
        nn.init.zeros_(self.final_layer.get_parameter("linear.weight"))
