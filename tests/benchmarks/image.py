"""Windowed TMSA, the image-space step beside EDM's DDPM++, dropout, augmentation, multiply-adds.

    python -m tests.benchmarks.image [--device cuda --dtype bf16]

Windowed TMSA is compared with global attention and with a loop over the windows, at 32 and 64
pixels; `cifar10` with DDPM++ of the published shape, and without its keyed dropout.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit_train.config import load_recipe, packaged_recipes
from diffit_train.data.augment import Resampling, augment, draw_augmentation
from diffit_train.models.attention import TMSA
from diffit_train.models.backbone import Backbone, trainable_parameters
from diffit_train.models.build import build_model
from diffit_train.models.cost import multiply_adds
from diffit_train.models.layers import keyed_dropout, layer_seeds
from diffit_train.models.wrap import use_kernel
from tests.benchmarks.common import interleaved_seconds, peak_bytes, print_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH, HEADS, TIME = 128, 4, 512


class _Loop(nn.Module):
    """A plain windowed attention: one window after another, by the reference kernel."""

    def __init__(self, layer: TMSA) -> None:
        super().__init__()
        self.layer = layer
        self.one = TMSA(WIDTH, HEADS, layer.window, None, TIME)
        self.one.load_state_dict(layer.state_dict())

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        side, window = self.layer.side, self.layer.window
        grid = x.unflatten(1, (side, side))
        out = torch.empty_like(grid)
        for top in range(0, side, window):
            for left in range(0, side, window):
                rows, columns = slice(top, top + window), slice(left, left + window)
                found = self.one(grid[:, rows, columns].flatten(1, 2), c)
                out[:, rows, columns] = found.unflatten(1, (window, window))
        return out.flatten(1, 2)


def _backward(module: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    def run() -> None:
        module.zero_grad(set_to_none=True)
        module(*inputs).sum().backward()

    return run


def _compare(title: str, bodies: dict[str, Callable[[], None]], device: torch.device) -> None:
    seconds = interleaved_seconds(bodies, device, 3)
    peak = {name: peak_bytes(body, device) for name, body in bodies.items()}
    base = next(iter(bodies))
    rows = [
        [
            name,
            f"{seconds[name] * 1e3:,.1f}",
            f"{seconds[name] / seconds[base]:.2f}",
            f"{peak[name] / 2**20:,.1f}",
            f"{peak[name] / peak[base]:.2f}",
        ]
        for name in bodies
    ]
    print_table(title, ["", "ms", f"to {base}", "peak MiB", f"to {base}"], rows)


def _windows(device: torch.device, dtype: torch.dtype, batch: int) -> None:
    fast = "sdpa" if device.type == "cuda" else "chunked"
    for side, window in ((32, 4), (64, 8)):
        torch.manual_seed(0)
        x = torch.randn(batch, side**2, WIDTH, device=device, dtype=dtype, requires_grad=True)
        c = torch.randn(batch, TIME, device=device, dtype=dtype)
        layer = TMSA(WIDTH, HEADS, side, window, TIME).to(device, dtype)
        bodies: dict[str, Callable[[], None]] = {}
        whole = TMSA(WIDTH, HEADS, side, None, TIME).to(device, dtype)
        for name, module, kernel in (
            (f"window {window}", layer, fast),
            ("global", whole, fast),
            ("one window after another", _Loop(layer).to(device, dtype), "reference"),
        ):
            use_kernel(module, kernel, device)
            bodies[name] = _backward(module, x, c)
        _compare(f"TMSA, {side}x{side} pixels, batch {batch}", bodies, device)


def _step(model: Backbone, batch: int, seeds: bool, device: torch.device) -> Callable[[], None]:
    x = torch.randn(batch, *model.input_shape, device=device)
    t, y = torch.zeros(batch, device=device), torch.zeros(batch, device=device, dtype=torch.long)
    drop = torch.arange(batch, device=device) if seeds else None
    forward = functools.partial(model, dropout_seeds=drop)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = forward(x, t, y)
        out.square().mean().backward()

    return run


def _steps(device: torch.device, batch: int) -> None:
    bodies: dict[str, Callable[[], None]] = {}
    for name, overrides, seeds in (
        ("cifar10", [], True),
        ("cifar10, no dropout", [], False),
        ("cifar10, 2 blocks a stage", ["model.blocks=[2,2,2]"], True),
        ("DDPM++", ["model={architecture: ddpmpp, conditional: false}"], False),
    ):
        model = build_model(load_recipe("cifar10", overrides)).to(device)
        use_kernel(model, "auto", device)
        with torch.device("meta"):
            counted = build_model(load_recipe("cifar10", overrides))
        work = multiply_adds(counted)[0] / 1e9
        size = trainable_parameters(model) / 1e6
        bodies[f"{name}: {size:.1f}M, {work:.1f} G"] = _step(model, batch, seeds, device)
    _compare(f"forward and backward, batch {batch}, {device.type}", bodies, device)


def _small_parts(device: torch.device, batch: int) -> None:
    x = torch.randn(batch, 128, 32, 32, device=device)
    seeds = layer_seeds(torch.arange(batch, device=device), 1)[0]
    images = torch.rand(batch, 3, 32, 32, device=device)
    what = Resampling.of(draw_augmentation(np.random.default_rng(0), batch, 0.12), 32)
    weight = torch.randn(128, 128, 3, 3, device=device)
    bodies: dict[str, Callable[[], object]] = {
        "3x3 convolution": lambda: F.conv2d(x, weight, padding=1),
        "keyed dropout": lambda: keyed_dropout(x, 0.13, seeds),
        "torch dropout": lambda: F.dropout(x, 0.13),
        "augmentation": lambda: augment(images, what),
    }
    seconds = interleaved_seconds(bodies, device, 5)
    base = seconds["3x3 convolution"]
    rows = [[name, f"{s * 1e3:,.2f}", f"{s / base:.2f}"] for name, s in seconds.items()]
    title = f"{batch} images of 32x32, 128 channels, fp32, {device.type}"
    print_table(title, ["", "ms", "to the convolution"], rows)


def _work() -> None:
    rows = []
    for name in packaged_recipes():
        with torch.device("meta"):
            model = build_model(load_recipe(name))
        total, products = multiply_adds(model)
        size = f"{trainable_parameters(model) / 1e6:,.1f}"
        rows.append([name, size, f"{total / 1e9:,.2f}", f"{products / 1e9:,.2f}"])
    print_table(
        "multiply-adds of one image, forward", ["recipe", "M", "G", "of them attention"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    device = torch.device(options.device)
    _work()
    _small_parts(device, 8 * options.batch)
    _steps(device, options.batch)
    _windows(device, DTYPES[options.dtype], options.batch)


if __name__ == "__main__":
    main()
