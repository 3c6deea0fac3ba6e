"""Is what runs on the device right? Everything is compared with float64, or with a plain loop."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from diffit_train.config.diffusion import PackagedDiffusion
from diffit_train.config.evaluate import SAMPLERS, Sampler
from diffit_train.config.train import EmaProfile, Train
from diffit_train.diffusion.objective import build_objective
from diffit_train.diffusion.schedule import linear_schedule
from diffit_train.models.attention import relative_position_index
from diffit_train.models.attention_kernels import KERNELS, reference_attention
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.wrap import checkpoint_activations, compile_blocks, use_kernel
from tests.gpu.kit import Report, largest_error, norm_error, start_ranks

# Largest errors that pass, relative to the largest exact value. An fp32 product in TF32 would be
# off by about 5e-4, a bf16 one is by 2^-8 = 4e-3.
FP32_LIMIT, BF16_LIMIT = 1e-4, 0.05


def run(report: Report) -> None:
    """All of it."""
    report.attempt("attention", lambda: kernels(report))
    report.attempt("precision", lambda: precisions(report))
    report.attempt("samplers", lambda: samplers(report))
    report.attempt("inception", lambda: inception(report), needs_s=10)
    report.attempt("engine", lambda: engines(report), needs_s=60)
    report.attempt("compile", lambda: compiled(report), needs_s=120)


# ---- Attention ----


def kernels(report: Report) -> None:
    """Every kernel, forward and backward, against the formula in float64."""
    for tokens, dtype in itertools.product((256, 1024), (torch.float32, torch.bfloat16)):
        for name in KERNELS:
            report.attempt(
                f"attention {name}", functools.partial(_kernel, report, name, tokens, dtype)
            )


def _kernel(report: Report, name: str, tokens: int, dtype: torch.dtype) -> None:
    machine = report.machine
    shape = machine.shape(tokens)
    inputs, index = _attention_inputs(shape, dtype, machine.device)
    exact = _outputs(reference_attention, [v.detach().double() for v in inputs], index, True)
    # torch has no backward pass of flex attention on a CPU.
    backward = machine.cuda or name != "flex"
    found = _outputs(KERNELS[name], inputs, index, backward)
    limit = FP32_LIMIT if dtype == torch.float32 else BF16_LIMIT
    errors = {
        part: largest_error(mine, true)
        for part, mine, true in zip(("out", "dq", "dk", "dv", "dbias"), found, exact, strict=False)
    }
    worst = max(errors.values(), key=lambda error: math.inf if math.isnan(error) else error)
    what = f"{name}, {shape.side**2:,} tokens, {str(dtype).removeprefix('torch.')}"
    report.check("attention against float64", what, worst, limit, **errors)


def _attention_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """q, k, v as slices of one projection, the bias table, and its row for each pair."""
    generator = torch.Generator().manual_seed(0)
    heads, size = shape.num_heads, shape.hidden_size // shape.num_heads
    qkv = torch.randn(2, shape.side**2, 3, heads, size, generator=generator)
    table = torch.randn((2 * shape.side - 1) ** 2, heads, generator=generator)
    qkv, table = (part.to(device, dtype) for part in (qkv, table))
    index = relative_position_index(shape.side).to(device)
    return [*qkv.permute(2, 0, 3, 1, 4), table], index


def _outputs(
    kernel: Callable[..., Tensor], inputs: list[Tensor], index: Tensor, backward: bool
) -> list[Tensor]:
    """The output, and the gradients of q, k, v and the table."""
    leaves = [part.detach().requires_grad_(backward) for part in inputs]
    out = kernel(*leaves, index)
    if not backward:
        return [out]
    target = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    (out.double() * target.view(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


# ---- Precision and compilation ----


def _model(shape: Shape) -> LatentDiffiT:
    """A model whose output and gradients are not zero."""
    torch.manual_seed(0)
    model = LatentDiffiT(shape)
    nn.init.normal_(model.final_layer.get_parameter("linear.weight"), std=0.1)
    return model


def _batch(shape: Shape, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = shape.latent_size
    x = torch.randn(count, shape.latent_channels, size, size, generator=generator)
    t = torch.randint(1000, (count,), generator=generator)
    return x, t, torch.randint(shape.num_classes or 1, (count,), generator=generator)


def _pass(
    model: nn.Module, shape: Shape, device: torch.device, autocast: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of one batch, as lists of tensors."""
    x, t, y = (part.to(device) for part in _batch(shape, 2, 1))
    if next(model.parameters()).dtype == torch.float64:
        x = x.double()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        out = model(x, t, y)
    out.double().square().mean().backward()
    gradients = [p.grad.detach() for p in model.parameters() if p.grad is not None]
    return [out.detach()], gradients


def precisions(report: Report) -> None:
    """fp32, bf16 weights and bf16 autocast against float64, with the kernel that `auto` means."""
    device = report.machine.device
    for tokens in (256, 1024):
        shape = report.machine.shape(tokens, depth=2)
        plain = _model(shape).to(device)
        kernel = use_kernel(plain, "auto", device)
        exact = _pass(copy.deepcopy(plain).double(), shape, device)
        for name, limit in (("fp32", FP32_LIMIT), ("bf16", 0.1), ("bf16_autocast", 0.1)):
            model = copy.deepcopy(plain)
            if name == "bf16":
                model.bfloat16()
            found = _pass(model, shape, device, name == "bf16_autocast")
            errors = [norm_error(mine, true) for mine, true in zip(found, exact, strict=True)]
            what = f"{name}, {shape.side**2:,} tokens, {kernel}"
            report.check(
                "model against float64", what, max(errors), limit,
                output=errors[0], gradients=errors[1],
            )  # fmt: skip


def compiled(report: Report) -> None:
    """Compiled blocks against eager ones, with the kernels that a recipe can choose."""
    device = report.machine.device
    shape = report.machine.shape(256, depth=2)
    names = ("sdpa", "flex") if report.machine.cuda else ("chunked",)
    for kernel, autocast, mode in itertools.product(names, (False, True), ("none", "selective")):
        what = f"{kernel}, {'bf16_autocast' if autocast else 'fp32'}, checkpointing {mode}"

        def compare(kernel: str = kernel, autocast: bool = autocast, mode: str = mode, what=what):
            # A process of training compiles one kind of block.
            torch.compiler.reset()
            eager, fast = _model(shape).to(device), _model(shape).to(device)
            for model in (eager, fast):
                use_kernel(model, kernel, device)
                checkpoint_activations(model, mode)
            compile_blocks(fast)
            expected = _pass(eager, shape, device, autocast)
            found = _pass(fast, shape, device, autocast)
            errors = [norm_error(mine, true) for mine, true in zip(found, expected, strict=True)]
            limit = BF16_LIMIT if autocast else FP32_LIMIT
            report.check(
                "compiled against eager", what, max(errors), limit,
                output=errors[0], gradients=errors[1],
            )  # fmt: skip

        report.attempt(f"compile, {what}", compare, needs_s=60)


# ---- Samplers ----


def samplers(report: Report) -> None:
    """Every sampler in fp32 on the device against float64 on the CPU, for Gaussian data."""
    for objective in ("epsilon", "flow", "edm"):
        for name in SAMPLERS[objective]:
            report.attempt(f"sampler {name}", functools.partial(_sampler, report, objective, name))


def _sampler(report: Report, objective: str, name: str) -> None:
    steps = 10 if report.machine.tiny else 50
    eta = {"eta": 0.5} if name == "ddim" else {}
    sampler = TypeAdapter(Sampler).validate_python({"name": name, "steps": steps, **eta})
    diffusion = TypeAdapter(PackagedDiffusion).validate_python({"objective": objective})
    results = []
    for device, dtype in (("cpu", torch.float64), (report.machine.device, torch.float32)):
        generator = np.random.default_rng(0)

        def draw(_: int, device=device, dtype=dtype, generator=generator) -> Tensor:
            return torch.from_numpy(generator.standard_normal((4, 4, 8, 8))).to(device, dtype)

        predict = functools.partial(_gaussian_prediction, diffusion)
        results.append(build_objective(diffusion).sample(sampler, predict, draw(-1), draw))
    error = largest_error(results[1], results[0])
    report.check("samplers against float64", f"{objective}, {name}, {steps} steps", error, 1e-3)


def _gaussian_prediction(diffusion: PackagedDiffusion, x: Tensor, t: float) -> Tensor:
    """What an ideal model predicts where the data are normal with mean 0.5 and deviation 0.7."""
    mean, variance = 0.5, 0.49
    if diffusion.objective == "flow":
        time = t / diffusion.timesteps
        spread = (1 - time) ** 2 * variance + time**2
        noise = time / spread * (x - (1 - time) * mean)
        return noise - (mean + (1 - time) * variance / spread * (x - (1 - time) * mean))
    if diffusion.objective == "edm":
        data = diffusion.sigma_data
        total = t**2 + data**2
        clean = mean + variance / (variance + t**2) * (x - mean)
        # As a network does, in fp32.
        return ((clean - data**2 / total * x) * math.sqrt(total) / (t * data)).float()
    schedule = linear_schedule(diffusion.timesteps, diffusion.beta_start, diffusion.beta_end)
    kept = torch.tensor(schedule.alpha_bar[int(t)], device=x.device, dtype=x.dtype)
    spread = kept * variance + 1 - kept
    noise = (1 - kept).sqrt() / spread * (x - kept.sqrt() * mean)
    return torch.cat([noise, torch.zeros_like(noise)], dim=1)


# ---- Inception ----


def inception(report: Report) -> None:
    """Inception on the device against the CPU, although convolutions may round to TF32 there."""
    from diffit_train.evaluation.inception import Inception

    device, side = report.machine.device, 96 if report.machine.tiny else 256
    torch.manual_seed(0)
    model = Inception().eval().requires_grad_(False)
    pixels = torch.randint(256, (2, side, side, 3), dtype=torch.uint8)
    expected = model(pixels)
    allowed = torch.backends.cudnn.allow_tf32
    found = copy.deepcopy(model).to(device)(pixels.to(device))
    for part, mine, true in zip(expected._fields, found, expected, strict=True):
        if not float(true.abs().max()) > 0:
            raise ValueError(f"{part} of Inception is zero")
        report.check("Inception against the CPU", part, largest_error(mine, true), FP32_LIMIT)
    if torch.backends.cudnn.allow_tf32 != allowed:
        report.fail("Inception left torch.backends.cudnn.allow_tf32 changed")
    x, weight = torch.randn(4, 64, 32, 32), torch.randn(64, 64, 3, 3)
    true = F.conv2d(x.double(), weight.double())
    rounded = largest_error(F.conv2d(x.to(device), weight.to(device)), true)
    report.note(
        f"A convolution of fp32 tensors outside Inception is off by {rounded:.1e} "
        f"(torch.backends.cudnn.allow_tf32 is {allowed})."
    )


# ---- Engine ----


def engines(report: Report) -> None:
    """The engine at world 1 against a plain loop, by ZeRO stage and precision."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(Path(folder), report.machine.device)
        for stage, precision in itertools.product(range(4), ("fp32", "bf16_autocast", "bf16")):
            if stage == 0 and precision == "bf16":  # which the recipe refuses
                continue
            report.attempt(
                f"engine, ZeRO {stage}, {precision}",
                functools.partial(_engine, report, stage, precision),
            )


def _engine(report: Report, stage: int, precision: str) -> None:
    from diffit_train.training.engine import Engine

    machine = report.machine
    device, shape = machine.device, machine.shape(256, depth=2)
    train = Train(
        steps=100, batch_size=2, lr=1e-3, zero_stage=stage, precision=precision, grad_clip=1.0,
        ema={"ema": EmaProfile(decay=0.9)},
    )  # fmt: skip
    model = _model(shape).to(device)
    plain = copy.deepcopy(model)
    for each in (model, plain):
        use_kernel(each, "auto", device)
    expected_losses, expected = _plain_loop(plain, train, shape, device)
    engine = Engine(model, train, 0, 1, device)
    losses = []
    for step in range(_STEPS):
        out = engine.forward(*(part.to(device) for part in _batch(shape, 2, step)))
        loss = _loss(out)
        losses.append(float(loss.detach()))
        engine.backward(loss)
        if not engine.step(step):
            raise ValueError(f"step {step} was not taken")
        engine.update_ema(step)
    found: dict[str, Tensor] = {n: torch.zeros(s.numel()) for n, s in engine.shapes.items()}
    for owned in engine.owned():
        values = owned.values["master"].float().cpu()
        found[owned.slice.name].narrow(0, owned.slice.offset, owned.slice.length).copy_(values)
    engine.destroy()
    start = {n: p.detach() for n, p in _model(shape).named_parameters() if p.requires_grad}
    # Updates, not weights: weights hardly change in a few steps.
    mine = [found[name].view(start[name].shape) - start[name] for name in start]
    true = [expected[name] - start[name] for name in start]
    of_losses = max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True))
    # Stage 3 adds a linear layer's bias after it has rounded the product.
    exact = precision == "fp32" or stage < 3
    limit, of_loss = (0.02, FP32_LIMIT) if exact else (0.1, 0.02)
    report.check(
        f"engine against a plain loop, {_STEPS} steps", f"ZeRO {stage}, {precision}",
        norm_error(mine, true), limit, losses=of_losses,
    )  # fmt: skip
    if not of_losses <= of_loss:
        report.fail(f"ZeRO {stage}, {precision}: losses differ by {of_losses:.3g}")


_STEPS = 5


def _loss(out: Tensor) -> Tensor:
    return out.float().square().mean(dim=(1, 2, 3)).mean()


def _plain_loop(
    model: LatentDiffiT, train: Train, shape: Shape, device: torch.device
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and fp32 weights of AdamW without DeepSpeed; bf16 weights follow fp32 masters."""
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    masters = {n: p.detach().clone().requires_grad_() for n, p in names.items()}
    optimizer = torch.optim.AdamW(
        list(masters.values()), lr=train.lr, betas=train.betas, weight_decay=0.0
    )
    narrow = train.precision == "bf16"
    if narrow:
        model.bfloat16()
        names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for step in range(_STEPS):
        batch = (part.to(device) for part in _batch(shape, 2, step))
        with torch.autocast(
            device.type, torch.bfloat16, enabled=train.precision == "bf16_autocast"
        ):
            out = model(*batch)
        loss = _loss(out)
        losses.append(float(loss.detach()))
        loss.backward()
        for name, parameter in names.items():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters.values(), train.grad_clip or math.inf)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(masters[name])
    return losses, {n: m.detach().cpu() for n, m in masters.items()}
