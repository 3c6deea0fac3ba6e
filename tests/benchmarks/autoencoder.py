"""Encoding and decoding on a CPU by memory layout; `python -m tests.gpu autoencoder` is for a GPU.

    python -m tests.benchmarks.autoencoder [--resolution 128] [--images 1] [--rounds 2]

The autoencoder has the size of Stable Diffusion's, with random weights.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch

from tests.benchmarks.common import interleaved_seconds, print_table
from tests.gpu.autoencoder import Arithmetic, loaded, stable_diffusion_autoencoder
from tests.gpu.kit import Machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    device = torch.device("cpu")
    plain = stable_diffusion_autoencoder(Machine(device, False, 0))
    ways = {
        name: loaded(plain, Arithmetic(torch.float32, False, channels_last), device)
        for name, channels_last in (("contiguous", False), ("channels last", True))
    }
    shape = (options.images, 3, options.resolution, options.resolution)
    pixels = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    side = options.resolution // 8
    latents = torch.randn(options.images, 4, side, side)
    rows = []
    for part, x in (("encode_moments", pixels), ("decode", latents)):
        bodies = {name: partial(getattr(way, part), x) for name, way in ways.items()}
        seconds = interleaved_seconds(bodies, device, options.rounds)
        for name, value in seconds.items():
            rate, ratio = options.images / value, seconds["contiguous"] / value
            rows.append([f"{part}, {name}", f"{rate:.3f}", f"{ratio:.2f}"])
    title = (
        f"{options.images} images at {options.resolution}, fp32, {torch.get_num_threads()} threads"
    )
    print_table(title, ["", "images/s", "vs. contiguous"], rows)


if __name__ == "__main__":
    main()
