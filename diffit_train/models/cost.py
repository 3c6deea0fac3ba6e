"""Cost of a model: parameters, multiply-adds and activation bytes.

All are counted on the model itself; a model on the meta device needs no memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffit_train.models.attention import TMSA
from diffit_train.models.backbone import Backbone, trainable_parameters
from diffit_train.models.wrap import KEPT_OPERATIONS, use_kernel


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Number of trainable parameters in each child module."""
    return {name: trainable_parameters(child) for name, child in model.named_children()}


def multiply_adds(model: Backbone) -> tuple[int, int]:
    """Multiply-adds of a forward pass for one image: total, and in attention products.

    Args:
        model: on the meta device; its kernel is set to the reference kernel.
    """
    use_kernel(model, "reference", torch.device("meta"))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*_inputs(model))
    by_operation = counter.get_flop_counts()["Global"]
    products = by_operation.get(torch.ops.aten.bmm, 0)
    return counter.get_total_flops() // 2, products // 2


def _inputs(model: Backbone, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy inputs, noise levels and labels, on the model's device."""
    device = next(model.parameters()).device
    zero = torch.zeros(batch, dtype=torch.long, device=device)
    return torch.zeros(batch, *model.input_shape, device=device), zero, zero


class _KeptBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of the results that selective checkpointing saves."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if function in KEPT_OPERATIONS:
            outputs = result if isinstance(result, tuple) else (result,)
            self.total += sum(t.numel() * t.element_size() for t in outputs)
        return result


def _saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes that autograd saves for the backward pass, except parameters and buffers."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(*inputs)
    total = sum(t.numel() * t.element_size() for t in kept.values())
    del result
    return total


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that start a kernel, and bytes that all but matrix products move."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not views and function not in KEPT_OPERATIONS:
            outputs = result if isinstance(result, tuple | list) else (result,)
            tensors = [t for t in (*args, *outputs) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        self.count += not views
        return result


# Kernels of a position bias, besides those of attention: to gather and cast it; to sum its gradient
# over the batch, and over the pairs of each offset.
BIAS_LAUNCHES = 12


def kernel_launches(model: Backbone, batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Kernels of a forward and backward pass in eager mode, and bytes that they move.

    Bytes without the operands of matrix products and of attention, and without `bias_bytes`.

    Args:
        model: on the meta device.
    """
    model = _prepared(model, dtype)
    with _Launches() as launched:
        model(*_inputs(model, batch)).sum().backward()
    biased = sum(isinstance(module, TMSA) for module in model.modules())
    return launched.count + BIAS_LAUNCHES * biased, launched.bytes


def activation_bytes(
    model: Backbone, batch: int, mode: str, every_nth: int, dtype: torch.dtype
) -> int:
    """Peak bytes of activations, at the start of the backward pass.

    Args:
        model: on the meta device.
        batch: images per rank.
        mode: as `train.activation_checkpointing`.
    """
    model = _prepared(model, dtype)
    inputs = _block_inputs(model, batch)
    total = _saved_bytes(model, *_inputs(model, batch))
    recomputed = 0
    for number, (block, given) in enumerate(zip(model.blocks, inputs, strict=True)):
        if mode == "none" or number % every_nth:
            continue
        whole = _saved_bytes(block, *given)
        into = given[0].numel() * given[0].element_size()
        kept = into
        if mode == "selective":
            with _KeptBytes() as counted:
                block(*given)
            kept += counted.total
        total += kept - whole
        recomputed = max(recomputed, whole)
    return total + recomputed


def _prepared(model: Backbone, dtype: torch.dtype) -> Backbone:
    """A copy on the meta device with weights of `dtype`."""
    model = copy.deepcopy(model).to(dtype)
    use_kernel(model, "chunked", torch.device("meta"))
    return model


def _block_inputs(model: Backbone, batch: int) -> list[tuple[Tensor, ...]]:
    """What each block is called with, requiring gradients."""
    seen: list[tuple[Tensor, ...]] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, given: seen.append(given))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(*_inputs(model, batch))
    for hook in hooks:
        hook.remove()
    return [tuple(v.detach().requires_grad_(v.is_floating_point()) for v in g) for g in seen]


def bias_bytes(model: Backbone, batch: int, size: int) -> int:
    """Bytes that sdpa moves for a dense position bias in training.

    Its mask, forward and backward, and the mask's gradient: torch writes it for each image (or
    window; `_efficient_attention_backward`) and then sums it over the batch.

    Args:
        size: bytes of a value.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, TMSA):
            windows = batch * (module.side // module.window) ** 2
            total += module.num_heads * module.window**4 * size * (2 + 2 * windows)
    return total


def training_flops_per_image(model: Backbone) -> float:
    """FLOPs of forward and backward for one image.

    Torch counts the matrix products of a forward pass; a backward pass costs twice as much.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*_inputs(model))
    return 3.0 * counter.get_total_flops()
