"""The arithmetic of a recipe's `precision`, put around a plain model of fp32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether matrix products and convolutions of fp32 tensors may round their inputs to TF32.

    TF32 keeps 10 bits of the mantissa and runs on a GPU's tensor cores. By default PyTorch allows
    it for convolutions, but not for matrix products. The settings apply to the whole process; those
    before the block are restored.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextmanager
def cudnn_benchmark(allowed: bool = True) -> Iterator[None]:
    """Whether cuDNN times its algorithms for each new shape, and keeps the fastest.

    Which one it is may change from process to process, and with it the last bits of results.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, allowed
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """The arithmetic of `evaluate.precision` or `train.precision` inside the block.

    Args:
        precision: fp32: full float32; tf32: see `tf32`; bf16_autocast: matrix products in bf16.
    """
    autocast = precision == "bf16_autocast"
    mixed = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    with tf32(precision == "tf32"), mixed:
        yield
