"""Applied to a plain model: attention kernel, activation checkpointing, autocast, compilation.

None of them changes results beyond rounding, or parameter names.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from diffit_train.models.attention import TMSA, SelfAttention
from diffit_train.models.attention_kernels import KERNELS, kernel_name
from diffit_train.models.backbone import Backbone

Checkpointing = Literal["none", "selective", "blocks"]

_aten = torch.ops.aten
# Selective checkpointing saves these and recomputes everything else, which is cheap.
KEPT_OPERATIONS = {
    _aten.addmm.default,
    _aten.mm.default,
    torch.ops.diffit.biased_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


def use_kernel(model: nn.Module, wanted: str, device: torch.device) -> str:
    """Set the attention kernel `wanted` (or `auto`) throughout the model; returns its name."""
    name = kernel_name(wanted, device)
    for module in model.modules():
        if isinstance(module, TMSA | SelfAttention):
            module.kernel = KERNELS[name]
    return name


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if op in KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
    )


def checkpoint_activations(model: Backbone, mode: Checkpointing, every_nth: int = 1) -> None:
    """Recompute block activations in the backward pass instead of saving them.

    Args:
        mode: `selective` saves the results of matrix products and attention; `blocks` saves only
            each block's input.
        every_nth: checkpoint every n-th block.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks[::every_nth]:
        # Patch `forward` instead of wrapping the module, so that parameter names do not change.
        block.forward = functools.partial(_checkpointed, block.forward, options)


def _checkpointed(forward: Any, options: dict[str, Any], *inputs: Tensor) -> Tensor:
    return checkpoint(forward, *inputs, **options)


def autocast_forward(model: nn.Module, device: torch.device) -> None:
    """Compute the model's forward pass, wherever it is called from, under bf16 autocast."""
    model.forward = functools.partial(_autocast, model.forward, device.type)


def _autocast(forward: Any, device_type: str, *inputs: Tensor, **extras: Tensor) -> Tensor:
    with torch.autocast(device_type, torch.bfloat16):
        return forward(*inputs, **extras)


def compile_blocks(model: Backbone, dynamic: bool | None = None, **options: Any) -> None:
    """Compile each block; identical blocks share one compilation.

    Args:
        dynamic: False compiles for each batch size; None makes one compilation for all sizes once
            a second one occurs.
        options: others of torch.compile.
    """
    for block in model.blocks:
        block.compile(dynamic=dynamic, **options)
