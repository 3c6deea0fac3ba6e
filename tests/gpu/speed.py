"""Time of blocks and of training steps, by attention kernel, beside DiT's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffit_train.models.backbone import Backbone
from diffit_train.models.cost import training_flops_per_image
from diffit_train.models.dit import DiT
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.wrap import compile_blocks, use_kernel
from tests.benchmarks.common import interleaved_seconds, matrix_rate, peak_bytes
from tests.gpu.kit import GIB, Report

MODELS: dict[str, type[Backbone]] = {"DiffiT": LatentDiffiT, "DiT": DiT}


def run(report: Report) -> None:
    """Blocks, then steps; both in bf16."""
    report.attempt("matrix products", lambda: _matrix_products(report))
    for tokens in (256, 1024):
        for compiled in (False, True):
            # Compiling on a CPU takes a minute, and its times are of no interest.
            if compiled and not report.machine.cuda:
                continue
            name = f"blocks, {tokens} tokens"
            report.attempt(name, functools.partial(blocks, report, tokens, compiled), needs_s=60)
    for tokens in (256, 1024):
        report.attempt(f"steps, {tokens} tokens", functools.partial(steps, report, tokens))


def _matrix_products(report: Report) -> None:
    rate = matrix_rate(report.machine.device, torch.bfloat16, rounds=2)
    report.add("matrix products, bf16", what="best of two sizes", tflops=rate / 1e12)


def variants(report: Report) -> list[tuple[str, str]]:
    """Models and kernels to measure; `flex` has no backward pass on a CPU."""
    kernels = ("sdpa", "flex") if report.machine.cuda else ("sdpa", "chunked")
    return [*itertools.product(("DiffiT",), kernels), ("DiT", "sdpa")]


def blocks(report: Report, tokens: int, compiled: bool = False) -> None:
    """Forward and backward of a block; `bias frozen` shows what the bias's gradient costs."""
    machine = report.machine
    shape, batch = machine.shape(tokens, depth=1), machine.batch(tokens)
    x = torch.randn(batch, shape.side**2, shape.hidden_size, device=machine.device)
    c = torch.randn(batch, shape.hidden_size, device=machine.device)
    x, c = (part.bfloat16().requires_grad_() for part in (x, c))
    frozen = [("DiffiT", kernel, True) for model, kernel in variants(report) if model == "DiffiT"]
    for model, kernel, fixed in [*((*pair, False) for pair in variants(report)), *frozen]:
        name = f"{model}, {kernel}{', bias frozen' if fixed else ''}"

        def measure(model: str = model, kernel: str = kernel, fixed=fixed, name=name) -> None:
            block = _block(MODELS[model], shape, kernel, machine.device, fixed)
            if compiled:
                block.compile()
            body = _backward(block, x, c)
            seconds = interleaved_seconds({name: body}, machine.device, 10 if machine.cuda else 1)
            report.add(
                f"a block, {shape.side**2:,} tokens, {batch} images, bf16"
                f"{', compiled' if compiled else ''}",
                what=name, ms=1e3 * seconds[name], peak_gib=peak_bytes(body, machine.device) / GIB,
            )  # fmt: skip

        report.attempt(name, measure, needs_s=30)


def _block(
    kind: type[Backbone], shape: Shape, kernel: str, device: torch.device, fixed: bool
) -> nn.Module:
    model = kind(shape).to(device, torch.bfloat16)
    use_kernel(model, kernel, device)
    if fixed:
        model.blocks[0].attn.relative_position_bias_table.requires_grad_(False)
    return model.blocks[0]


def _backward(block: nn.Module, x: Tensor, c: Tensor) -> Callable[[], None]:
    def body() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = c.grad = None
        block(x, c).sum().backward()

    return body


def steps(report: Report, tokens: int) -> None:
    """Forward, backward and AdamW of the whole model in a plain loop, in bf16 autocast."""
    machine = report.machine
    shape, batch = machine.shape(tokens), machine.batch(tokens)
    rate = matrix_rate(machine.device, torch.bfloat16, rounds=2)
    for (model, kernel), compiled in itertools.product(variants(report), (False, True)):
        if compiled and not machine.cuda:
            continue
        name = f"{model}, {kernel}{', compiled' if compiled else ''}"

        def measure(model: str = model, kernel: str = kernel, compiled=compiled, name=name) -> None:
            network = MODELS[model](shape).to(machine.device)
            use_kernel(network, kernel, machine.device)
            flops = training_flops_per_image(network) * batch
            if compiled:
                compile_blocks(network)
            body = _step(network, batch, shape, machine.device)
            seconds = interleaved_seconds({name: body}, machine.device, 5 if machine.cuda else 1)
            report.add(
                f"a step, {shape.side**2:,} tokens, {batch} images, bf16_autocast",
                what=name,
                ms=1e3 * seconds[name],
                images_per_s=batch / seconds[name],
                of_matrix_rate=flops / (seconds[name] * rate),
                peak_gib=peak_bytes(body, machine.device) / GIB,
            )

        report.attempt(name, measure, needs_s=40)


def _step(model: Backbone, batch: int, shape: Shape, device: torch.device) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(batch, *model.input_shape, device=device)
    t = torch.randint(1000, (batch,), device=device)
    y = torch.randint(shape.num_classes or 1, (batch,), device=device)

    def body() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(x, t, y).float().square().mean()
        loss.backward()
        optimizer.step()

    return body
