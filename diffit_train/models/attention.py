"""Time-dependent multihead self-attention (TMSA), DiffiT paper section 3.1, equations 3 to 6.

One module, several kernels. A kernel is a plain function

    kernel(q, k, v, table, index) -> softmax(q k^T / sqrt(K) + B) v

of q, k, v (B, H, N, K), a bias table (R, H) and the row of that table for each pair of tokens,
(N, N) int64; table and index are None where attention has no position bias.

Shapes: B pictures (or windows), N tokens, D hidden size, H heads, K = D / H.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from diffit_train.errors import UserError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]

# Attention weights that `stretched_attention` computes at once: 4 MiB in fp32, for the cache.
STRETCH_WEIGHTS = 1 << 20


def relative_position_index(side: int) -> Tensor:
    """Row of the bias table for each pair of tokens: (N, N) int64, N = side^2.

    The table has (2 side - 1)^2 rows, one for each offset (rows, columns) between two tokens.
    """
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    position = grid.flatten(1)  # (2, N)
    offset = position[:, :, None] - position[:, None, :] + side - 1
    return offset[0] * (2 * side - 1) + offset[1]


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias B of every pair of tokens, (H, N, N)."""
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1)


# ---- Kernels ----


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """Equation 6 as it stands; every weight is held. Any dtype, any device."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if table is not None and index is not None:
        logits = logits + position_bias(table, index)
    return logits.softmax(-1).to(v.dtype) @ v


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """torch's scaled-dot-product attention with the bias as its mask.

    On a CPU torch holds every weight where the bias wants a gradient; see `stretched_attention`.
    """
    if table is None or index is None:
        return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=position_bias(table, index).to(q.dtype)
    )


def stretched_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """For CPUs: attention in stretches that fit a cache, with weights computed again backward.

    It keeps q, k and v only. Without position bias torch's own kernel does as well.
    """
    if table is None or index is None:
        return F.scaled_dot_product_attention(q, k, v)
    return _biased_attention(q, k, v, table, index)


def _stretches(batch: int, heads: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Pictures and heads whose attention weights fit the cache: some pictures, or some heads."""
    heads_at_once = min(heads, max(1, STRETCH_WEIGHTS // count**2))
    pictures = max(1, STRETCH_WEIGHTS // (heads * count**2))
    for start in range(0, batch, pictures):
        for head in range(0, heads, heads_at_once):
            yield slice(start, start + pictures), slice(head, head + heads_at_once)


def _weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).mul_(1.0 / math.sqrt(q.shape[-1])).add_(bias).softmax(-1)


# One operation to torch, so that selective checkpointing keeps its result and compilers leave it
# alone.
@torch.library.custom_op("diffit::biased_attention", mutates_args=())
def _biased_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    batch, heads, count, size = q.shape
    bias = position_bias(table, index).to(q.dtype).contiguous()
    out = q.new_empty(batch, count, heads, size).transpose(1, 2)
    for rows, some in _stretches(batch, heads, count):
        out[rows, some] = _weights(q[rows, some], k[rows, some], bias[some]) @ v[rows, some]
    return out


@_biased_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    batch, heads, count, size = q.shape
    return q.new_empty(batch, count, heads, size).transpose(1, 2)


@torch.library.custom_op("diffit::biased_attention_backward", mutates_args=())
def _biased_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q, k, v in the layout (B, N, 3, H, K) of their projection, and of the table."""
    batch, heads, count, size = q.shape
    scale = 1.0 / math.sqrt(size)
    bias = position_bias(table, index).to(q.dtype).contiguous()
    grad_qkv = q.new_empty(batch, count, 3, heads, size)
    grad_q, grad_k, grad_v = grad_qkv.permute(2, 0, 3, 1, 4)
    grad_bias = torch.zeros_like(bias, dtype=table.dtype)
    for rows, some in _stretches(batch, heads, count):
        place = (rows, some)
        query, key, value, grad = q[place], k[place], v[place], grad_out[place]
        weights = _weights(query, key, bias[some])
        grad_v[place] = weights.transpose(-2, -1) @ grad
        # The softmax's gradient: weights * (dW - sum(weights * dW)), here in place.
        grad_logits = grad @ value.transpose(-2, -1)
        inner = torch.linalg.vecdot(grad_logits, weights).unsqueeze(-1)
        grad_logits.sub_(inner).mul_(weights)
        grad_bias[some] += grad_logits.sum(0, dtype=table.dtype)
        grad_q[place] = (grad_logits @ key).mul_(scale)
        grad_k[place] = (grad_logits.transpose(-2, -1) @ query).mul_(scale)
    by_pair = grad_bias.permute(1, 2, 0).reshape(-1, heads)
    return grad_qkv, torch.zeros_like(table).index_add_(0, index.view(-1), by_pair)


@_biased_attention_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    batch, heads, count, size = q.shape
    return q.new_empty(batch, count, 3, heads, size), torch.empty_like(table)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_qkv, grad_table = _biased_attention_backward(grad_out, *ctx.saved_tensors)
    return *grad_qkv.permute(2, 0, 3, 1, 4), grad_table, None


_biased_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.diffit.biased_attention)
def _flops(q: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, count, size = q
    return 4 * batch * heads * count * count * size


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """FlexAttention: the bias is looked up inside the kernel, so no (N, N) tensor exists.

    Compiled on CUDA; elsewhere torch evaluates the same function eagerly, which is for tests.
    """
    run = _compiled_flex() if q.is_cuda else _eager_flex()
    if table is None or index is None:
        return run(q, k, v)
    rows, bias = index, table

    def add_bias(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[rows[i, j], head]

    return run(q, k, v, score_mod=add_bias)


def _eager_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as run

    return run


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(_eager_flex(), dynamic=False)


KERNELS: dict[str, Kernel] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "stretched": stretched_attention,
    "flex": flex_attention,
}


def kernel_name(wanted: str, device: torch.device) -> str:
    """The kernel to use: `wanted`, or for `auto` flex on CUDA and stretched elsewhere.

    Raises:
        UserError: flex was asked for where it would be evaluated eagerly.
    """
    if wanted == "auto":
        return "flex" if device.type == "cuda" else "stretched"
    if wanted == "flex" and device.type != "cuda":
        raise UserError(
            f"model.attention is 'flex', which needs a CUDA device, but this runs on "
            f"{device.type}; set model.attention=auto"
        )
    return wanted


# ---- Modules ----


class SelfAttention(nn.Module):
    """Multihead self-attention without time or position, as in DiT. `kernel` may be replaced."""

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
    """Self-attention whose queries, keys and values are linear in token and time-label token.

    q, k, v = qkv(x) + qkv_temb(c)                       (equations 3 to 5)
    out = softmax(q k^T / sqrt(K) + B) v                 (equation 6)

    B is a learned bias for each head and each relative position. With a window, tokens attend to
    those of their own window x window square only. `kernel` may be replaced.

    Args:
        side: of the square grid of tokens.
        window: side of a window; None for one window over the whole grid.
        condition_size: size of the token c, where it is not the hidden size.

    Raises:
        ValueError: sizes that do not divide.
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
        self.qkv_temb = nn.Linear(condition_size or hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        rows = (2 * self.window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(self.window))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, D) in row order and conditioning c (B, condition size) to (B, N, D)."""
        qkv = self.qkv(x) + self.qkv_temb(c)[:, None, :]
        windowed = self.window < self.side
        if windowed:
            qkv = _to_windows(qkv, self.side, self.window)
        table, index = self.relative_position_bias_table, self.relative_position_index
        out = _attend(self.kernel, qkv, self.num_heads, table, index)
        if windowed:
            out = _from_windows(out, self.side, self.window)
        return self.proj(out)


def _require_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ValueError(f"{num_heads} heads do not divide hidden_size {hidden_size}")


def _attend(
    kernel: Kernel, qkv: Tensor, num_heads: int, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """Projected tokens (B, N, 3D) to attended ones (B, N, D)."""
    batch, count, width = qkv.shape
    q, k, v = qkv.view(batch, count, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return kernel(q, k, v, table, index).transpose(1, 2).reshape(batch, count, width // 3)


def _to_windows(x: Tensor, side: int, window: int) -> Tensor:
    """(B, side^2, D) to (B * windows, window^2, D), windows and their tokens in row order."""
    many, width = side // window, x.shape[-1]
    cut = x.view(-1, many, window, many, window, width).transpose(2, 3)
    return cut.reshape(-1, window**2, width)


def _from_windows(x: Tensor, side: int, window: int) -> Tensor:
    """Undo `_to_windows`."""
    many, width = side // window, x.shape[-1]
    return x.view(-1, many, many, window, window, width).transpose(2, 3).reshape(-1, side**2, width)
