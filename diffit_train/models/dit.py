"""DiT with adaLN-Zero (Peebles and Xie 2023), the baseline, and DiT with TMSA in its place.

Shapes as in latent.py. Names are those of DiT's published weights.
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
    """A block whose norms and branches are scaled, shifted and gated by time and label."""

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
    """DiT; at the default shape DiT-XL/2 for 256x256."""

    def make_block(self, shape: Shape) -> nn.Module:
        """A DiT block."""
        return DiTBlock(shape)

    def make_final_layer(self, shape: Shape) -> nn.Module:
        """DiT's."""
        return DiTFinalLayer(shape)

    def zero_initialise(self) -> None:
        """Gates, shifts and scales are zero, so every block starts as the identity."""
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)


class DiTWithTMSA(LatentTransformer):
    """DiT in which TMSA takes the place of every modulation (paper section 5.9).

    The paper gives no code for it. Here blocks are DiffiT's, and the last layer is DiT's without
    its modulation, so it differs from the latent DiffiT by the SiLU before the last projection.
    """

    def make_block(self, shape: Shape) -> nn.Module:
        """A DiffiT block."""
        return Block(shape.hidden_size, shape.num_heads, shape.mlp_ratio, shape.side)

    def make_final_layer(self, shape: Shape) -> nn.Module:
        """DiT's, without modulation."""
        return FinalLayer(shape, silu=False)

    def zero_initialise(self) -> None:
        """The first prediction is zero, as in DiT."""
        nn.init.zeros_(self.final_layer.get_parameter("linear.weight"))
