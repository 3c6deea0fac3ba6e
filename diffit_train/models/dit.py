"""The baseline DiT with adaLN-Zero (Peebles and Xie 2023), and DiT with TMSA instead.

Shapes as in latent.py. Parameter names are those of DiT's published weights.
"""

from __future__ import annotations

from torch import Tensor, nn

from diffit_train.models.attention import SelfAttention
from diffit_train.models.latent import Block, FinalLayer, LatentTransformer, Shape
from diffit_train.models.layers import Mlp, layer_norm


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens (B, N, D) scaled and shifted by (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """A block with adaLN-Zero: time and label scale, shift and gate its norms and branches."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, shape.num_heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, shape.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and conditioning c (B, D) to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiTFinalLayer(nn.Module):
    """Modulated LayerNorm and a projection of each token to its patch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, shape.patch_size**2 * shape.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) to (B, N, patch_size^2 * O)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(LatentTransformer):
    """DiT; the default shape is DiT-XL/2 for 256x256."""

    def make_block(self, shape: Shape) -> nn.Module:
        """A DiT block."""
        return DiTBlock(shape)

    def make_final_layer(self, shape: Shape) -> nn.Module:
        """DiT's final layer."""
        return DiTFinalLayer(shape)

    def zero_initialize(self) -> None:
        """Zero gates, shifts and scales, so that every block starts as the identity."""
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)


class DiTWithTMSA(LatentTransformer):
    """DiT with TMSA instead of modulation (paper section 5.9).

    There is no published code. Here the blocks are DiffiT's and the final layer is DiT's without
    modulation, so the only difference from the latent DiffiT is the SiLU before the final
    projection.
    """

    def make_block(self, shape: Shape) -> nn.Module:
        """A DiffiT block."""
        return Block(shape.hidden_size, shape.num_heads, shape.mlp_ratio, shape.side)

    def make_final_layer(self, shape: Shape) -> nn.Module:
        """DiT's final layer, without modulation."""
        return FinalLayer(shape, silu=False)

    def zero_initialize(self) -> None:
        """Zero the last projection, so that the initial prediction is zero, as in DiT."""
        nn.init.zeros_(self.final_layer.get_parameter("linear.weight"))
