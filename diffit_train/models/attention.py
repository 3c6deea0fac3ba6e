"""Time-dependent multihead self-attention (TMSA), DiffiT paper section 3.1, equations 3 to 6.

Shapes: B images (or windows), N tokens, D hidden size, H heads, K = D / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit_train.models.attention_kernels import Kernel, position_bias, sdpa_attention


def relative_position_index(side: int) -> Tensor:
    """Bias table row of each pair of tokens: (N, N) int64, N = side^2.

    The table has (2 side - 1)^2 rows, one per offset (rows, columns) between two tokens.
    """
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    position = grid.flatten(1)  # (2, N)
    offset = position[:, :, None] - position[:, None, :] + side - 1
    return offset[0] * (2 * side - 1) + offset[1]


class SelfAttention(nn.Module):
    """Multihead self-attention without time or position, as in DiT. `kernel` can be replaced."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        _require_heads(hidden_size, num_heads)
        self.num_heads = num_heads
        self.kernel: Kernel = sdpa_attention
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens x (B, N, D) to (B, N, D)."""
        return self.proj(_attend(self.kernel, self.qkv(x), self.num_heads, None, None))


class TMSA(nn.Module):
    """Self-attention with queries, keys and values linear in the tokens and the conditioning c.

    q, k, v = qkv(x) + qkv_temb(c)                       (equations 3 to 5)
    out = softmax(q k^T / sqrt(K) + B) v                 (equation 6)

    B is a learned bias per head and relative position. With a window, tokens attend only within
    their own window x window square. `kernel` can be replaced.

    Args:
        side: side of the square token grid.
        window: side of a window; None for one window over the whole grid.
        condition_size: size of c; None for the hidden size.

    Raises:
        ValueError: hidden size not divisible by heads, or side by window.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        side: int,
        window: int | None = None,
        condition_size: int | None = None,
    ) -> None:
        super().__init__()
        _require_heads(hidden_size, num_heads)
        self.window = side if window is None else window
        if side % self.window:
            raise ValueError(f"window {window} does not divide the side {side} of the token grid")
        self.num_heads = num_heads
        self.side = side
        self.kernel: Kernel = sdpa_attention
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.make_time_layer(hidden_size, condition_size or hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        rows = (2 * self.window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(self.window))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D), row-major, and conditioning c (B, condition size) to (B, N, D)."""
        return self.proj(self.attend(self.qkv(x) + self.qkv_temb(c)[:, None, :], self.kernel))

    def make_time_layer(self, hidden_size: int, condition_size: int) -> None:
        """Make the layer that projects c."""
        self.qkv_temb = nn.Linear(condition_size, 3 * hidden_size)

    def attend(self, qkv: Tensor, kernel: Kernel) -> Tensor:
        """Projected tokens (B, N, 3D) to attention output (B, N, D), within windows."""
        windowed = self.window < self.side
        if windowed:
            qkv = _to_windows(qkv, self.side, self.window)
        table, index = self.relative_position_bias_table, self.relative_position_index
        out = _attend(kernel, qkv, self.num_heads, table, index)
        return _from_windows(out, self.side, self.window) if windowed else out


class NoTimeConditioning(TMSA):
    """TMSA without time: windowed self-attention with relative-position bias."""

    def make_time_layer(self, hidden_size: int, condition_size: int) -> None:
        """None."""

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """As TMSA; c is not used."""
        return self.proj(self.attend(self.qkv(x), self.kernel))


class SeparateTime(TMSA):
    """Spatial tokens and the time token attend separately (paper, table 7).

    The time token, alone in its attention, returns its value, which is added to the output.
    """

    def make_time_layer(self, hidden_size: int, condition_size: int) -> None:
        """Project c to its value."""
        self.v_temb = nn.Linear(condition_size, hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """As TMSA."""
        return self.proj(self.attend(self.qkv(x), self.kernel) + self.v_temb(c)[:, None, :])


class TimeInBias(TMSA):
    """The time token enters only the relative-position bias (paper, table 6, config F)."""

    def make_time_layer(self, hidden_size: int, condition_size: int) -> None:
        """Project c to an offset of each entry of the bias table."""
        rows = (2 * self.window - 1) ** 2
        self.bias_temb = nn.Linear(condition_size, rows * self.num_heads)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """As TMSA."""
        offsets = self.bias_temb(c).view(len(c), -1, self.num_heads)

        def kernel(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None):  # type: ignore[no-untyped-def]
            assert table is not None and index is not None
            # Windows of an image follow each other.
            bias = position_bias(table + offsets, index).repeat_interleave(len(q) // len(c), dim=0)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))

        return self.proj(self.attend(self.qkv(x), kernel))


def _require_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ValueError(f"{num_heads} heads do not divide hidden_size {hidden_size}")


def _attend(
    kernel: Kernel, qkv: Tensor, num_heads: int, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """Projected tokens (B, N, 3D) to attention output (B, N, D)."""
    batch, count, width = qkv.shape
    q, k, v = qkv.view(batch, count, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return kernel(q, k, v, table, index).transpose(1, 2).reshape(batch, count, width // 3)


def _to_windows(x: Tensor, side: int, window: int) -> Tensor:
    """(B, side^2, D) to (B * windows, window^2, D), windows and their tokens row-major."""
    many, width = side // window, x.shape[-1]
    cut = x.view(-1, many, window, many, window, width).transpose(2, 3)
    return cut.reshape(-1, window**2, width)


def _from_windows(x: Tensor, side: int, window: int) -> Tensor:
    """Undo `_to_windows`."""
    many, width = side // window, x.shape[-1]
    return x.view(-1, many, many, window, window, width).transpose(2, 3).reshape(-1, side**2, width)
