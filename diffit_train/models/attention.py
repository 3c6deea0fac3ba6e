"""Time-dependent multihead self-attention (TMSA), DiffiT paper section 3.1, equations 3 to 6.

Shapes: B pictures, N tokens (side x side), D hidden size, H heads, K = D / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative_position_index(side: int) -> Tensor:
    """Row of the bias table for each pair of tokens: (N, N) int64, N = side^2.

    The table has (2 side - 1)^2 rows, one for each offset (rows, columns) between two tokens.
    """
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    position = grid.flatten(1)  # (2, N)
    offset = position[:, :, None] - position[:, None, :] + side - 1
    return offset[0] * (2 * side - 1) + offset[1]


class TMSA(nn.Module):
    """Self-attention whose queries, keys and values are linear in token and time-label token.

    q, k, v = qkv(x) + qkv_temb(c)                       (equations 3 to 5)
    out = softmax(q k^T / sqrt(K) + B) v                 (equation 6)

    B is a learned bias for each head and each relative position.
    """

    relative_position_index: Tensor

    def __init__(self, hidden_size: int, num_heads: int, side: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"{num_heads} heads do not divide hidden_size {hidden_size}")
        self.num_heads = num_heads
        self.side = side
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.qkv_temb = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        rows = (2 * side - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(side))

    def position_bias(self) -> Tensor:
        """The bias of every pair of tokens, (1, H, N, N)."""
        count = self.side**2
        pairs = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        return pairs.view(1, count, count, self.num_heads).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) and conditioning c (B, D) to (B, N, D)."""
        batch, count, hidden = x.shape
        qkv = self.qkv(x) + self.qkv_temb(c)[:, None, :]
        q, k, v = qkv.view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.position_bias().to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(batch, count, hidden))
