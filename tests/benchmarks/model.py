"""Forward and backward of the whole 561M model against DiT-XL/2 and the machine's matmul rate.

    python -m tests.benchmarks.model [--device cuda --dtype bf16 --batch 64 --compile]

The matmul rate is measured before and after each pass, because a shared machine's speed varies.
`kept` is the activation memory after a forward pass; `peak` includes gradients.
"""

from __future__ import annotations

import argparse
import functools

import torch

from diffit_train.models.backbone import Backbone
from diffit_train.models.cost import training_flops_per_image
from diffit_train.models.dit import DiT
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.wrap import checkpoint_activations, compile_blocks, use_kernel
from tests.benchmarks.block import DTYPES
from tests.benchmarks.common import (
    beside_matrix_rate,
    kept_bytes,
    peak_bytes,
    print_table,
)


def _body(model: Backbone, x: torch.Tensor, dtype: torch.dtype):
    t = torch.randint(1000, (len(x),), device=x.device)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x, t, t).float().square().mean()
        loss.backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--latent", type=int, default=32, choices=(32, 64))
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    shape = Shape(latent_size=options.latent)
    fast = "flex" if device.type == "cuda" else "chunked"
    variants = {
        "DiffiT, plain": (LatentDiffiT, "reference", "none"),
        f"DiffiT, {fast}": (LatentDiffiT, fast, "none"),
        f"DiffiT, {fast}, selective": (LatentDiffiT, fast, "selective"),
        "DiT-XL/2": (DiT, "sdpa", "none"),
    }
    fastest = 0.0
    x = torch.randn(options.batch, 4, options.latent, options.latent, device=device)
    seconds, share, kept, peak = {}, {}, {}, {}
    for name, (kind, kernel, mode) in variants.items():
        torch.manual_seed(0)
        model = kind(shape).to(device)
        use_kernel(model, kernel, device)
        flops = training_flops_per_image(model) * options.batch
        checkpoint_activations(model, mode)
        if options.compile:
            compile_blocks(model)
        body = _body(model, x, dtype)
        # One model at a time: four would not fit.
        body()
        passes = [beside_matrix_rate(body, device, dtype) for _ in range(options.rounds)]
        seconds[name] = min(elapsed for elapsed, _ in passes)
        share[name] = max(flops / (elapsed * rate) for elapsed, rate in passes)
        fastest = max(fastest, *(rate for _, rate in passes))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            t = torch.zeros(options.batch, dtype=torch.long, device=device)
            kept[name] = kept_bytes(functools.partial(model, x, t, t), device)
        peak[name] = peak_bytes(body, device)
        del model, body
    rows = [
        [
            name,
            f"{seconds[name]:,.3f}",
            f"{options.batch / seconds[name]:,.2f}",
            f"{seconds['DiT-XL/2'] / seconds[name]:.2f}",
            f"{share[name]:.1%}",
            f"{kept[name] / 2**30:,.2f}",
            f"{kept[name] / kept['DiffiT, plain']:.2f}",
            f"{peak[name] / 2**30:,.2f}",
        ]
        for name in variants
    ]
    title = (
        f"latent {options.latent}, batch {options.batch}, {options.dtype}, {device.type}, "
        f"{'compiled' if options.compile else 'eager'}; "
        f"matrix products: up to {fastest / 1e9:,.0f} GFLOP/s"
    )
    columns = ["", "s", "images/s", "speed vs. DiT", "of matmul rate"]
    columns += ["kept GiB", "to plain", "peak GiB"]
    print_table(title, columns, rows)


if __name__ == "__main__":
    main()
