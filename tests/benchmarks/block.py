"""A block of the 561M model against plain attention and against DiT-XL/2's block.

    python -m tests.benchmarks.block [--device cuda --dtype bf16]

Time of forward and backward, memory saved for backward (most of a deep model's memory), and peak
memory including weight gradients, at 256 and 1024 tokens. `plain` materializes the softmax; the
block `selective` recomputes norms and activations in its backward pass
(train.activation_checkpointing=selective).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffit_train.models.attention import TMSA
from diffit_train.models.backbone import Backbone
from diffit_train.models.dit import DiT
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.wrap import checkpoint_activations, use_kernel
from tests.benchmarks.common import interleaved_seconds, kept_bytes, peak_bytes, print_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _block(kind: type[Backbone], side: int, kernel: str, mode: str, x: Tensor) -> nn.Module:
    model = kind(Shape(latent_size=2 * side, depth=1)).to(x.device, x.dtype)
    use_kernel(model, kernel, x.device)
    checkpoint_activations(model, mode)
    return model.blocks[0]


def _attention(side: int, kernel: str, x: Tensor) -> nn.Module:
    module = TMSA(1152, 16, side).to(x.device, x.dtype)
    use_kernel(module, kernel, x.device)
    return module


def _body(module: nn.Module, x: Tensor, c: Tensor) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = c.grad = None
        module(x, c).sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    fast = "flex" if device.type == "cuda" else "chunked"
    for side in (16, 32):
        torch.manual_seed(0)
        x = torch.randn(options.batch, side**2, 1152, device=device, dtype=dtype)
        c = torch.randn(options.batch, 1152, device=device, dtype=dtype)
        x.requires_grad_()
        c.requires_grad_()
        modules = {
            "TMSA, plain": _attention(side, "reference", x),
            f"TMSA, {fast}": _attention(side, fast, x),
            "block, plain": _block(LatentDiffiT, side, "reference", "none", x),
            f"block, {fast}": _block(LatentDiffiT, side, fast, "none", x),
            f"block, {fast}, selective": _block(LatentDiffiT, side, fast, "selective", x),
            "DiT-XL/2 block": _block(DiT, side, "sdpa", "none", x),
        }
        bodies = {name: _body(module, x, c) for name, module in modules.items()}
        seconds = interleaved_seconds(bodies, device, options.rounds)
        kept = {
            name: kept_bytes(functools.partial(module, x, c), device)
            for name, module in modules.items()
        }
        peak = {name: peak_bytes(body, device) for name, body in bodies.items()}
        rows = []
        for name in bodies:
            plain = "TMSA, plain" if name.startswith("TMSA") else "block, plain"
            rows.append(
                [
                    name,
                    f"{seconds[name] * 1e3:,.1f}",
                    f"{seconds[name] / seconds[plain]:.2f}",
                    f"{kept[name] / 2**20:,.1f}",
                    f"{kept[name] / kept[plain]:.2f}",
                    f"{peak[name] / 2**20:,.1f}",
                    f"{peak[name] / peak[plain]:.2f}",
                ]
            )
        title = f"{side**2} tokens, batch {options.batch}, {options.dtype}, {device.type}"
        print_table(
            title, ["", "ms", "to plain", "kept MiB", "to plain", "peak MiB", "to plain"], rows
        )


if __name__ == "__main__":
    main()
