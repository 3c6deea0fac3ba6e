"""Layers shared by the transformers: patch, position, timestep and label embeddings, MLP.

Shapes: B images, C channels, h x w latent pixels, N tokens, D hidden size.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    """LayerNorm over D without affine parameters, as in the published weights."""
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class FullPrecisionConv2d(nn.Conv2d):
    """A convolution that never rounds its input: casts weights up to it, disables autocast.

    If weights and input have the same dtype, it equals nn.Conv2d bit for bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D, h', w') in the wider dtype of input and weights."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        # The meta device has no autocast.
        known = torch.amp.is_autocast_available(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if known else nullcontext():
            return self._conv_forward(x.to(dtype), self.weight.to(dtype), bias)


class PatchEmbed(nn.Module):
    """Split (B, C, h, w) into patches and project each to D: (B, N, D), tokens in row-major order.

    Computed in the latents' dtype even with bf16 weights or autocast: at low noise levels, noisy
    latents differ from clean ones by less than bf16 can represent.
    """

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = FullPrecisionConv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        # Xavier over the flattened patch, as for a linear layer.
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """(B, N, patch_size^2 * channels) to (B, channels, h, w); N must be a perfect square."""
    batch, count, _ = tokens.shape
    side = math.isqrt(count)
    x = tokens.reshape(batch, side, side, patch_size, patch_size, channels)
    x = x.permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, channels, side * patch_size, side * patch_size)


def sincos_position_table(hidden_size: int, side: int, spread: int | None = None) -> Tensor:
    """Fixed 2D sine-cosine positions (1, side^2, D): first half columns, second half rows.

    Args:
        spread: side of the grid whose position range the `side` tokens cover evenly; None for
            `side`. A model trained with `spread` tokens per row then sees no unseen positions.
    """
    if hidden_size % 4:
        raise ValueError(f"hidden_size must be a multiple of 4, not {hidden_size}")
    quarter = hidden_size // 4
    frequency = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    positions = np.arange(side) * ((spread or side) / side)
    row, column = np.meshgrid(positions, positions, indexing="ij")

    def encode(position: np.ndarray) -> np.ndarray:
        angle = position.reshape(-1, 1) * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    table = np.concatenate([encode(column), encode(row)], axis=1)
    return torch.tensor(table, dtype=torch.float32).unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) to (B, D): sinusoidal features (cosines first), then a two-layer MLP."""

    features = 256
    max_period = 10000

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first = nn.Linear(self.features, hidden_size)
        second = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def angles(self, t: Tensor) -> Tensor:
        """(B,) to (B, features / 2)."""
        half = self.features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        return t.float()[:, None] * torch.exp(-math.log(self.max_period) * exponent)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, D)."""
        angle = self.angles(t)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) to (B, D). Row `num_classes` is the null class for guidance."""

    def __init__(self, num_classes: int, hidden_size: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=init_std)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) to (B, D)."""
        return self.embedding_table(labels)


class Mlp(nn.Module):
    """Two linear layers with tanh-approximated GELU in between."""

    def __init__(self, hidden_size: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.fc2(self.act(self.fc1(x)))


class TimedMlp(Mlp):
    """An MLP whose hidden layer the time token is added to (paper, table 6, config G)."""

    def __init__(self, hidden_size: int, ratio: float, time_size: int) -> None:
        super().__init__(hidden_size, ratio)
        self.temb = nn.Linear(time_size, int(hidden_size * ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, D) and time token (B, T) to (B, N, D)."""
        return self.fc2(self.act(self.fc1(x) + self.temb(c)[:, None, :]))


def layer_seeds(seeds: Tensor, layers: int) -> Tensor:
    """Seeds of dropout (layers, B) int32 of each layer, from those of the images (B,) int64.

    Args:
        seeds: less than 2^31.
    """
    layer = torch.arange(layers, dtype=torch.int32, device=seeds.device)
    return _mixed(_mixed(seeds.to(torch.int32)) + layer[:, None])


def keyed_dropout(x: Tensor, probability: float, seeds: Tensor) -> Tensor:
    """Dropout whose mask depends only on the image's seed for this layer, and on the element.

    So it is the same for any batch, number of workers and recomputation of activations.

    Args:
        x: (B, ...).
        seeds: (B,), of `layer_seeds`. A layer does not mix in its own number, which would be a
            constant of its compiled graph, so that no two blocks could share one.
    """
    count = x[0].numel()
    element = torch.arange(count, dtype=torch.int32, device=x.device) * _int32(0x9E3779B1)
    bits = _mixed(seeds[:, None] + element[None, :]) & 0x7FFFFFFF
    kept = (bits >= int(probability * 2**31)).view(x.shape)
    return x * kept / (1.0 - probability)


def _mixed(bits: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 on int32, whose shifts keep the sign, which the masks remove."""
    bits = (bits ^ (bits >> 16) & 0xFFFF) * _int32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13) & 0x7FFFF) * _int32(0xC2B2AE35)
    return bits ^ (bits >> 16) & 0xFFFF


def _int32(value: int) -> int:
    """An unsigned 32-bit number as a signed one."""
    return value - 2**32 if value >= 2**31 else value
