"""The latent DiffiT (paper section 3.2, appendix I.2), with the names of the published weights.

Shapes: B pictures, C latent channels, h x w latent pixels, N tokens, D hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

from diffit_train.models.attention import TMSA
from diffit_train.models.layers import (
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_table,
    unpatchify,
)


class Block(nn.Module):
    """x + TMSA(LN(x), c), then x + MLP(LN(x)): equations 7 and 8."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = TMSA(hidden_size, num_heads, side)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and conditioning c (B, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x), c)
        return x + self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """LayerNorm, SiLU, and a zero-initialised projection of each token to its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.act = nn.SiLU()
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, patch_size^2 * out_channels)."""
        return self.linear(self.act(self.norm(x)))


class LatentDiffiT(nn.Module):
    """Noise prediction and variance of a noisy latent, given its timestep and label.

    Args:
        latent_size: side of the square latent, h = w; a multiple of `patch_size`.
        latent_channels: C.
        num_classes: classes of the data; label `num_classes` is the null class.
        patch_size, hidden_size, depth, num_heads, mlp_ratio: size of the transformer.
        label_init_std: standard deviation of the label table at the start (0.02 as published).

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        latent_size: int = 32,
        latent_channels: int = 4,
        num_classes: int = 1000,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        label_init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if latent_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide latent size {latent_size}")
        side = latent_size // patch_size
        self.patch_size = patch_size
        self.latent_channels = latent_channels
        self.num_classes = num_classes
        self.x_embedder = PatchEmbed(latent_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, label_init_std)
        self.pos_embed = nn.Parameter(sincos_position_table(hidden_size, side), requires_grad=False)
        self.blocks = nn.ModuleList(
            [Block(hidden_size, num_heads, mlp_ratio, side) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, 2 * latent_channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in [*self.blocks.modules(), *self.final_layer.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The first prediction is zero noise whatever the input, as in DiT.
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noisy latents x (B, C, h, w), timesteps t (B,), labels y (B,) to (B, 2C, h, w).

        The first C channels are the predicted noise, the last C the variance interpolation.
        """
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x), self.patch_size, 2 * self.latent_channels)


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that the optimizer moves."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
