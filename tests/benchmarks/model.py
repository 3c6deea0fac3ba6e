"""Forward and backward of the whole 561M model against DiT-XL/2 and the machine's matrix rate.

    python -m tests.benchmarks.model [--device cuda --dtype bf16 --batch 64 --compile]

Peak memory is that of activations and gradients beside the weights.
"""

from __future__ import annotations

import argparse

import torch

from diffit_train.models.dit import DiT
from diffit_train.models.latent import LatentDiffiT, LatentTransformer, Shape
from diffit_train.models.runtime import checkpoint_activations, compile_blocks, use_kernel
from diffit_train.training.telemetry import training_flops_per_image
from tests.benchmarks.block import DTYPES
from tests.benchmarks.common import interleaved_seconds, matrix_rate, peak_bytes, print_table


def _body(model: LatentTransformer, x: torch.Tensor, dtype: torch.dtype):
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
    fast = "flex" if device.type == "cuda" else "stretched"
    variants = {
        "DiffiT, plain": (LatentDiffiT, "reference", "none"),
        f"DiffiT, {fast}": (LatentDiffiT, fast, "none"),
        f"DiffiT, {fast}, selective": (LatentDiffiT, fast, "selective"),
        "DiT-XL/2": (DiT, "sdpa", "none"),
    }
    rate = matrix_rate(device, dtype)
    x = torch.randn(options.batch, 4, options.latent, options.latent, device=device)
    seconds, memory, flops = {}, {}, {}
    for name, (kind, kernel, mode) in variants.items():
        torch.manual_seed(0)
        model = kind(shape).to(device)
        use_kernel(model, kernel, device)
        flops[name] = training_flops_per_image(model, 4, options.latent) * options.batch
        checkpoint_activations(model, mode)
        if options.compile:
            compile_blocks(model)
        body = _body(model, x, dtype)
        # One model at a time, since four would not fit; the matrix rate is taken beside each.
        rate = max(rate, matrix_rate(device, dtype))
        seconds[name] = interleaved_seconds({name: body}, device, options.rounds)[name]
        memory[name] = peak_bytes(body, device)
        del model, body
    rows = [
        [
            name,
            f"{seconds[name]:,.3f}",
            f"{options.batch / seconds[name]:,.2f}",
            f"{seconds['DiT-XL/2'] / seconds[name]:.2f}",
            f"{flops[name] / seconds[name] / rate:.1%}",
            f"{memory[name] / 2**30:,.2f}",
            f"{memory[name] / memory['DiffiT, plain']:.2f}",
        ]
        for name in variants
    ]
    title = (
        f"latent {options.latent}, batch {options.batch}, {options.dtype}, {device.type}, "
        f"{'compiled' if options.compile else 'eager'}; matrix products: {rate / 1e9:,.0f} GFLOP/s"
    )
    columns = ["", "s", "pictures/s", "speed to DiT", "of matrix rate", "peak GiB", "to plain"]
    print_table(title, columns, rows)


if __name__ == "__main__":
    main()
