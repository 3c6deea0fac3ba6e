"""Encoding and decoding by memory layout and cuDNN's search; activations against their estimate.

    python -m tests.benchmarks.autoencoder [--device cuda] [--resolution 256] [--images 2]

The autoencoder has the size of Stable Diffusion's, with random weights.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.common import interleaved_seconds, print_table
from tests.benchmarks.encode import make_autoencoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layouts(
    folder: Path, part: str, dtype: torch.dtype, resolution: int, images: int, device: torch.device
) -> dict[str, float]:
    """Seconds by layout, and on a GPU by whether cuDNN searches."""
    from diffusers import AutoencoderKL

    bodies: dict[str, Callable[[], object]] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        options = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
        model: Any = AutoencoderKL.from_pretrained(folder, **options).eval()
        model = model.to(device, memory_format=layout)
        side, channels = (resolution, 3) if part == "encode" else (resolution // 8, 4)
        x = torch.randn(images, channels, side, side, device=device, dtype=dtype)
        x = x.to(memory_format=layout)
        name = "contiguous" if layout == torch.contiguous_format else "channels_last"
        searches = (False, True) if device.type == "cuda" else (False,)
        for search in searches:
            title = f"{name}, searched" if search else name
            bodies[title] = partial(_body, getattr(model, part), x, search)
    return interleaved_seconds(bodies, device, rounds=2)


@torch.no_grad()
def _body(run: Callable[[Tensor], object], x: Tensor, search: bool) -> None:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, search
    try:
        run(x)
    finally:
        torch.backends.cudnn.benchmark = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--types", nargs="+", choices=sorted(DTYPES), default=["fp32"])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_autoencoder(Path(name), (128, 256, 512, 512))
        for part, kind in itertools.product(("encode", "decode"), options.types):
            device = torch.device(options.device)
            sizes = (options.resolution, options.images, device)
            seconds = layouts(Path(name), part, DTYPES[kind], *sizes)
            rows += [
                [
                    f"{part}, {kind}, {way}",
                    f"{options.images / value:.2f}",
                    f"{seconds['contiguous'] / value:.2f}",
                ]
                for way, value in seconds.items()
            ]
    title = f"{options.images} images at {options.resolution}, on {options.device}"
    print_table(title, ["", "images/s", "vs. contiguous"], rows)


if __name__ == "__main__":
    main()
