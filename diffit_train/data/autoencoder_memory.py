"""How many images an autoencoder works on at once, from a budget for its activations.

A decode of 64 images at 512x512 by Stable Diffusion's autoencoder would hold 48 GiB in fp32. Group
norms are over one image, so slices of a batch give the results of the whole one, up to the rounding
of the kernel that a library chooses for a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from diffit_train.storage import GIB

Part = Literal["encode", "decode"]

# Tensors that AutoencoderKL holds at once, counted on it: in a residual layer of as many output as
# input channels; of other input channels, those that it reads; in the attention between encoder and
# decoder levels.
KL_RESIDUAL, KL_READ, KL_ATTENTION = 5, 3, 9
TINY_TENSORS = 3.2
CPU_BUDGET = 2 * GIB
# Of a GPU's memory, and of what is free of it: it also holds the model that generates.
GPU_SHARE, FREE_SHARE = 1 / 8, 1 / 2


def activation_values(config: Any, kind: str, part: Part) -> float:
    """Most values that the autoencoder holds at once, per pixel of the image.

    Args:
        config: diffusers' configuration of the model.
        kind: `autoencoder.kind`.
    """
    if kind == "tiny":
        channels: Sequence[int] = getattr(config, f"{part}r_block_out_channels")
        return TINY_TENSORS * max(channels)
    channels = config.block_out_channels
    # A level reads what the next higher, or in decoding the upsampled lower one made.
    last = len(channels) - 1
    step = -1 if part == "encode" else 1
    reads = [channels[min(last, max(0, level + step))] for level in range(last + 1)]
    values = [
        max(KL_RESIDUAL * own, KL_READ * read) / 4**level
        for level, (own, read) in enumerate(zip(channels, reads, strict=True))
    ]
    return float(max(*values, KL_ATTENTION * channels[-1] / 4**last))


def budget_bytes(device: torch.device) -> int:
    """Bytes of activations at once.

    On a GPU a share of its memory, so that shards are encoded in the same slices each time, or less
    if little of it is free.
    """
    if device.type != "cuda":
        return CPU_BUDGET
    free, total = torch.cuda.mem_get_info(device)
    # What the allocator keeps for reuse is also free.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(GPU_SHARE * total, FREE_SHARE * free))


def slice_size(images: int, bytes_each: float, budget: int) -> int:
    """Images at once: all, or the largest power of two that fits; at least one."""
    fit = max(1, int(budget // bytes_each)) if bytes_each else images
    return max(1, images) if fit >= images else 1 << (fit.bit_length() - 1)
