"""Encoding and decoding by an autoencoder of Stable Diffusion's shape, with random weights."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffit_train.data.autoencoder import LoadedAutoencoder
from diffit_train.models.precision import cudnn_benchmark
from tests.benchmarks.common import interleaved_seconds, peak_bytes
from tests.gpu.kit import GIB, Machine, Report, norm_error

SCALE = 0.18215


class Arithmetic(NamedTuple):
    """How the autoencoder computes; `tuned` lets cuDNN choose algorithms by measuring them."""

    dtype: torch.dtype
    tf32: bool
    channels_last: bool = False
    tuned: bool = False


WAYS = {
    "fp32": Arithmetic(torch.float32, False),
    "tf32": Arithmetic(torch.float32, True),
    "tf32, channels last": Arithmetic(torch.float32, True, True),
    "bf16": Arithmetic(torch.bfloat16, True),
    "bf16, channels last": Arithmetic(torch.bfloat16, True, True),
    "bf16, channels last, cudnn.benchmark": Arithmetic(torch.bfloat16, True, True, True),
}


def run(report: Report) -> None:
    """Images of 256x256 and 512x512 by each arithmetic, against fp32."""
    machine = report.machine
    torch.manual_seed(0)
    plain = stable_diffusion_autoencoder(machine)
    for resolution in (16, 32) if machine.tiny else (256, 512):
        by_arithmetic(report, plain, resolution)


def by_arithmetic(report: Report, plain: Any, resolution: int) -> None:
    """Both directions, for images of R x R pixels."""
    exact: dict[str, Tensor] = {}
    for name, direction in itertools.product(WAYS, ("encode", "decode")):
        body = functools.partial(_measure, report, plain, resolution, name, direction, exact)
        report.attempt(f"{direction}, {resolution}, {name}", body, needs_s=20)


def stable_diffusion_autoencoder(machine: Machine) -> Any:
    """An AutoencoderKL of the sizes of Stable Diffusion's; a tiny one of the same structure."""
    from diffusers import AutoencoderKL

    widths, groups = ((8, 8, 16, 16), 4) if machine.tiny else ((128, 256, 512, 512), 32)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1 if machine.tiny else 2,
        latent_channels=4,
        norm_num_groups=groups,
        scaling_factor=SCALE,
    )
    return model.eval().requires_grad_(False)


def loaded(plain: Any, way: Arithmetic, device: torch.device) -> LoadedAutoencoder:
    """A copy of the autoencoder on a device."""
    model = copy.deepcopy(plain).to(device, way.dtype)
    if way.channels_last:
        model = model.to(memory_format=torch.channels_last)
    # A budget that never divides a batch: memory is measured by image.
    return LoadedAutoencoder(
        model,
        "random",
        SCALE,
        device,
        way.dtype,
        tf32=way.tf32,
        budget=2**62,
        search=way.tuned,
    )


def _measure(
    report: Report,
    plain: Any,
    resolution: int,
    name: str,
    direction: str,
    exact: dict[str, Tensor],
) -> None:
    """Images per second and memory of one direction; the error relative to fp32."""
    machine, way = report.machine, WAYS[name]
    # 512x512 pixels take four times the memory; fp32 decoding holds 3 GiB for each 4 images there.
    count = 2 if machine.tiny else {256: 32, 512: 8}[resolution]
    autoencoder = loaded(plain, way, machine.device)
    random = np.random.default_rng(0)
    pixels = random.uniform(-1, 1, (count, 3, resolution, resolution)).astype(np.float32)
    latents = random.standard_normal((count, 4, resolution // 8, resolution // 8), np.float32)
    on_device = torch.from_numpy(latents).to(machine.device)
    found: list[np.ndarray] = []

    def body() -> None:
        found[:] = [
            autoencoder.encode_moments(pixels)
            if direction == "encode"
            else autoencoder.decode(on_device)
        ]

    with cudnn_benchmark(way.tuned):
        rounds = 3 if machine.cuda else 1
        (seconds,) = interleaved_seconds({name: body}, machine.device, rounds).values()
        peak = peak_bytes(body, machine.device)
    values = torch.from_numpy(found[0]).float()
    true = exact.setdefault(direction, values)
    report.add(
        f"{direction}, {resolution}x{resolution}, {count} images",
        what=name,
        images_per_s=count / seconds,
        peak_gib=peak / GIB,
        gib_per_image=peak / GIB / count,
        to_fp32=norm_error([values], [true]),
    )
