"""Checkpointing, compilation and autocast change no result beyond rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffit_train.models.backbone import Backbone
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.wrap import checkpoint_activations, compile_blocks, use_kernel

SMALL = Shape(
    latent_size=8, latent_channels=3, out_channels=6, num_classes=5, hidden_size=32, depth=4,
    num_heads=2,
)  # fmt: skip


def _model() -> Backbone:
    torch.manual_seed(0)
    model = LatentDiffiT(SMALL)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


def _step(
    model: Backbone, autocast: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Output, gradients, and the largest number of elements in a saved attention tensor."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x, torch.tensor([1, 500, 999]), torch.tensor([0, 3, 5])).float()
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def _compare(change: Callable[[Backbone], object], tolerance: float, **options: bool):
    plain, changed = _model(), _model()
    change(changed)
    assert list(changed.state_dict()) == list(plain.state_dict())
    (expected, gradients), (out, found) = _step(plain), _step(changed, **options)
    scale = expected.abs().max()
    torch.testing.assert_close(out / scale, expected / scale, atol=tolerance, rtol=0)
    for name, gradient in gradients.items():
        # The key part of the time projection has no gradient in theory, only rounding noise.
        size = max(gradient.abs().max(), 1e-4 * gradients["final_layer.linear.weight"].abs().max())
        torch.testing.assert_close(found[name] / size, gradient / size, atol=tolerance, rtol=0)


@pytest.mark.parametrize("mode", ["selective", "blocks"])
@pytest.mark.parametrize("every_nth", [1, 3])
def test_checkpointing_changes_nothing(mode: str, every_nth: int) -> None:
    _compare(lambda model: checkpoint_activations(model, mode, every_nth), 0.0)


def test_kernels_change_nothing_beyond_rounding() -> None:
    _compare(lambda model: use_kernel(model, "reference", torch.device("cpu")), 1e-5)


def test_autocast_changes_nothing_beyond_bf16() -> None:
    _compare(lambda model: None, 0.1, autocast=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compilation_changes_nothing_beyond_rounding(mode: str) -> None:
    def change(model: Backbone) -> None:
        checkpoint_activations(model, mode)
        compile_blocks(model)

    _compare(change, 1e-5)


def _lasting_bytes(mode: str, every_nth: int = 1) -> int:
    """Memory that stays allocated between forward and backward."""
    model = _model()
    checkpoint_activations(model, mode, every_nth)
    x = torch.randn(16, 3, 8, 8)
    t = torch.zeros(16, dtype=torch.long)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        out = model(x, t, t)
    total = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    del out
    return total


def test_checkpointing_saves_memory() -> None:
    none, selective, blocks = (_lasting_bytes(m) for m in ("none", "selective", "blocks"))
    half = _lasting_bytes("blocks", 2)
    assert selective < 0.8 * none
    assert blocks < 0.4 * selective
    assert blocks < half < none
