"""Attention kernels: implementations of one function for different devices.

A kernel is a plain function

    kernel(q, k, v, table, index) -> softmax(q k^T / sqrt(K) + B) v

of q, k, v (B, H, N, K), a bias table (R, H), and the table row of each pair of tokens, (N, N)
int64. Without position bias, table and index are None.

Shapes: B images (or windows), N tokens, H heads, K features per head.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from diffit_train.errors import UserError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]

# Attention weights per chunk of `chunked_attention`: 4 MiB in fp32, to fit the cache.
CHUNK_WEIGHTS = 1 << 20


def _gather_bias(table: Tensor, index: Tensor) -> Tensor:
    # Not `table[index]`, permuted: on GPUs, torch refuses every fused attention kernel for a mask
    # whose last stride is not 1.
    bias = table.mT.index_select(-1, index.view(-1))
    return bias.view(*bias.shape[:-1], *index.shape)


class _PositionBias(torch.autograd.Function):
    """Gathers the bias; sums its gradient over pairs of equal offset in fp32, in a fixed order.

    The gradient of plain indexing is a scatter, which compilers turn into unordered atomic
    additions in the table's dtype.
    """

    @staticmethod
    def forward(table: Tensor, index: Tensor) -> Tensor:
        return _gather_bias(table, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        side = math.isqrt(grad.shape[-1])
        # (..., H, N, N) to (..., H, row i, row j, column i, column j), tokens j reversed.
        pairs = grad.reshape(*grad.shape[:-2], side, side, side, side)
        by_column = _diagonal_sums(pairs.transpose(-2, -3).flip(-1, -3))
        by_offset = _diagonal_sums(by_column.movedim(-1, -3))
        return by_offset.mT.flatten(-2).mT.to(ctx.dtype), None


def _diagonal_sums(x: Tensor) -> Tensor:
    """(..., n, n) to the sums of its 2n - 1 antidiagonals in fp32 or wider, (..., 2n - 1).

    With rows n wider, row i begins i elements later in rows of 2n - 1: sums of columns.
    """
    count = x.shape[-1]
    skewed = F.pad(x, (0, count)).flatten(-2)[..., :-count]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return skewed.view(*skewed.shape[:-1], count, 2 * count - 1).sum(-2, dtype=dtype)


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias B for every pair of tokens of a square grid.

    Args:
        table: (..., R, H), with R = (2 sqrt(N) - 1)^2.
        index: `relative_position_index`, (N, N).

    Returns:
        (..., H, N, N), contiguous.
    """
    return cast(Tensor, _PositionBias.apply(table, index))  # type: ignore[no-untyped-call]


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """Equation 6 as written; materializes all attention weights. Any dtype, any device."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if table is not None and index is not None:
        logits = logits + position_bias(table, index)
    return logits.softmax(-1).to(v.dtype) @ v


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """torch's scaled_dot_product_attention with the bias as its mask.

    On a CPU, torch materializes all weights if the bias requires grad; see `chunked_attention`.
    """
    if table is None or index is None:
        return F.scaled_dot_product_attention(q, k, v)
    # Four dimensions: cuDNN's kernel refuses a mask of three.
    bias = position_bias(table, index).to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """For CPUs: attention in chunks that fit the cache.

    Saves only q, k and v, and recomputes the weights in the backward pass. Without position bias,
    torch's own kernel already does so.
    """
    if table is None or index is None:
        return F.scaled_dot_product_attention(q, k, v)
    return cast(Tensor, torch.ops.diffit.biased_attention(q, k, v, table, index))


def _chunks(batch: int, heads: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and heads small enough that their attention weights fit the cache."""
    heads_at_once = min(heads, max(1, CHUNK_WEIGHTS // count**2))
    images = max(1, CHUNK_WEIGHTS // (heads * count**2))
    for start in range(0, batch, images):
        for head in range(0, heads, heads_at_once):
            yield slice(start, start + images), slice(head, head + heads_at_once)


def _weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).mul_(1.0 / math.sqrt(q.shape[-1])).add_(bias).softmax(-1)


def _biased_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    batch, heads, count, size = q.shape
    bias = _gather_bias(table, index).to(q.dtype)
    out = q.new_empty(batch, count, heads, size).transpose(1, 2)
    for rows, part in _chunks(batch, heads, count):
        out[rows, part] = _weights(q[rows, part], k[rows, part], bias[part]) @ v[rows, part]
    return out


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor) -> Tensor:
    batch, heads, count, size = q.shape
    return q.new_empty(batch, count, heads, size).transpose(1, 2)


def _biased_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q, k, v in the layout of their projection, (B, N, 3, H, K), and of the table."""
    batch, heads, count, size = q.shape
    scale = 1.0 / math.sqrt(size)
    bias = _gather_bias(table, index).to(q.dtype)
    grad_qkv = q.new_empty(batch, count, 3, heads, size)
    grad_q, grad_k, grad_v = grad_qkv.permute(2, 0, 3, 1, 4)
    grad_bias = torch.zeros_like(bias, dtype=table.dtype)
    for rows, part in _chunks(batch, heads, count):
        chunk = (rows, part)
        query, key, value, grad = q[chunk], k[chunk], v[chunk], grad_out[chunk]
        weights = _weights(query, key, bias[part])
        grad_v[chunk] = weights.transpose(-2, -1) @ grad
        # Gradient of softmax: weights * (dW - sum(weights * dW)), in place.
        grad_logits = grad @ value.transpose(-2, -1)
        inner = torch.linalg.vecdot(grad_logits, weights).unsqueeze(-1)
        grad_logits.sub_(inner).mul_(weights)
        grad_bias[part] += grad_logits.sum(0, dtype=table.dtype)
        grad_q[chunk] = (grad_logits @ key).mul_(scale)
        grad_k[chunk] = (grad_logits.transpose(-2, -1) @ query).mul_(scale)
    by_pair = grad_bias.permute(1, 2, 0).reshape(-1, heads)
    return grad_qkv, torch.zeros_like(table).index_add_(0, index.view(-1), by_pair)


def _fake_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    batch, heads, count, size = q.shape
    return q.new_empty(batch, count, 3, heads, size), torch.empty_like(table)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.diffit.biased_attention_backward
    grad_qkv, grad_table = backward(grad_out, *ctx.saved_tensors)
    return *grad_qkv.permute(2, 0, 3, 1, 4), grad_table, None


def _flops(q: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, count, size = q
    return 4 * batch * heads * count * count * size


def _register_operators() -> None:
    """Make both functions operators of torch.

    So compilers leave them alone, and selective checkpointing can save their results. Once a
    process: a copy of this module, in an exported folder, would take the names from the first.
    """
    if hasattr(torch.ops.diffit, "biased_attention"):
        return
    attention = torch.library.custom_op(
        "diffit::biased_attention", _biased_attention, mutates_args=()
    )
    attention.register_fake(_fake_attention)
    backward = torch.library.custom_op(
        "diffit::biased_attention_backward", _biased_attention_backward, mutates_args=()
    )
    backward.register_fake(_fake_attention_backward)
    attention.register_autograd(_backward, setup_context=_keep)
    register_flop_formula(torch.ops.diffit.biased_attention)(_flops)


_register_operators()


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, index: Tensor | None
) -> Tensor:
    """FlexAttention: finds the bias inside the kernel, so no (N, N) tensor is materialized.

    A pair's table row is computed from the two positions; `index`, 8 N^2 bytes that every block of
    the kernel would read, is not used. The table's gradient is summed by atomic additions: it is
    not deterministic, and slow where many pairs share a row.

    Compiled on CUDA; elsewhere evaluated eagerly by torch, for tests only.
    """
    run = _compiled_flex() if q.is_cuda else _eager_flex()
    if table is None or index is None:
        return run(q, k, v)
    side, bias = math.isqrt(q.shape[2]), table
    width = 2 * side - 1

    def add_bias(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = (i // side - j // side + side - 1) * width + i % side - j % side + side - 1
        return score + bias[row, head]

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
    "chunked": chunked_attention,
    "flex": flex_attention,
}


# `auto` on CUDA. FlexAttention has not been measured on a GPU yet; with a learned bias it pays for
# atomics in the bias's gradient and for heads of 72 padded to 128. `python -m tests.gpu speed`
# compares the two: change this where it shows that another one is faster.
AUTO_ON_CUDA = "sdpa"


def kernel_name(wanted: str, device: torch.device) -> str:
    """The kernel to use: `wanted`, or for `auto` `AUTO_ON_CUDA` on CUDA and chunked elsewhere.

    Raises:
        UserError: flex was requested on a device where it would be evaluated eagerly.
    """
    if wanted == "auto":
        return AUTO_ON_CUDA if device.type == "cuda" else "chunked"
    if wanted == "flex" and device.type != "cuda":
        raise UserError(
            f"model.attention is 'flex', which needs a CUDA device, but this runs on "
            f"{device.type}; set model.attention=auto"
        )
    return wanted


def enable_determinism(kernel: str) -> None:
    """Make torch refuse or replace nondeterministic operations, for the rest of this process.

    Call before the process first uses cuBLAS, which reads its workspace setting only once.

    Raises:
        UserError: the kernel sums gradients by atomic additions.
    """
    if kernel == "flex":
        raise UserError(
            "train.deterministic is true, but model.attention 'flex' sums the gradient of the "
            "position bias by atomic additions; set model.attention=sdpa"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
