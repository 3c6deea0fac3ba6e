"""DDPM++ and NCSN++: published sizes, resampling by formula, and TMSA in place of attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from diffit_train.config import load_recipe
from diffit_train.errors import UserError
from diffit_train.models.attention import TMSA, SelfAttention
from diffit_train.models.backbone import trainable_parameters
from diffit_train.models.build import build_model
from diffit_train.models.unet import Resample, UNet, UNetBlock, UNetShape

SMALL = UNetShape(
    resolution=8, channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(8,)
)


def _counted(into: int, out: int, embedding: int, resampled: bool, attention: bool) -> int:
    """Parameters of a block, from the definition of EDM's."""
    count = 2 * into + 9 * into * out + out  # norm, convolution
    count += embedding * out + out + 2 * out + 9 * out * out + out
    if resampled or into != out:
        count += into * out + out
    if attention:
        count += 2 * out + 3 * (out * out + out) + out * out + out
    return count


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp"])
def test_sizes_of_edms_networks_for_cifar(kind: str) -> None:
    with torch.device("meta"):
        model = UNet(UNetShape(kind=kind, augment_labels=9))  # type: ignore[arg-type]
    noise = 128 if kind == "ddpmpp" else 256
    total = 9 * noise + noise * 512 + 512 + 512 * 512 + 512 + 27 * 128 + 128
    skips, width = [128], 128
    for stage in range(3):
        if stage:
            total += _counted(width, width, 512, True, False)
            skips.append(width)
            if kind == "ncsnpp":
                total += 9 * (3 if stage == 1 else 256) * 256 + 256
        for _ in range(4):
            total += _counted(width, 256, 512, False, stage == 1)
            width = 256
            skips.append(width)
    total += _counted(256, 256, 512, False, True) + _counted(256, 256, 512, False, False)
    for stage in (2, 1, 0):
        if stage < 2:
            total += _counted(256, 256, 512, True, False)
        for number in range(5):
            total += _counted(256 + skips.pop(), 256, 512, False, stage == 1 and number == 4)
    total += 2 * 256 + 9 * 256 * 3 + 3
    assert trainable_parameters(model) == total
    if kind == "ddpmpp":  # known as 55.7M
        assert total / 1e6 == pytest.approx(55.7, abs=0.05)


def test_resampling() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pairs = x.view(2, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(Resample((1, 1), up=False)(x), pairs)
    nearest = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(Resample((1, 1), up=True)(x), nearest)
    smooth, ramp = (1, 3, 3, 1), torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    down = Resample(smooth, up=False)(ramp)[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(down, torch.tensor([2.5, 4.5]).expand(2, 2))
    up = Resample(smooth, up=True)(ramp)[0, 0, 3, 3:-3]
    torch.testing.assert_close(up, torch.arange(10) / 2.0 + 1.25)


def _randomized(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_a_block_is_computed_by_its_equations() -> None:
    block = _randomized(UNetBlock(replace(SMALL, dropout=0.5), 8, 16, 4, 0, attention=True))
    x, c = torch.randn(2, 8, 4, 4), torch.randn(2, SMALL.embedding)

    def normed(norm: nn.GroupNorm, v: torch.Tensor) -> torch.Tensor:
        grouped = v.view(2, norm.num_groups, -1)
        scaled = (grouped - grouped.mean(2, keepdim=True)) / torch.sqrt(
            grouped.var(2, unbiased=False, keepdim=True) + 1e-6
        )
        weight, bias = (p.view(1, -1, 1, 1) for p in (norm.weight, norm.bias))
        return scaled.view_as(v) * weight + bias

    silu = torch.nn.functional.silu
    with torch.no_grad():
        inner = block.conv0(silu(normed(block.norm0, x)))
        inner = inner + block.affine(c).view(2, 16, 1, 1)
        inner = block.conv1(silu(normed(block.norm1, inner)))
        half = (inner + block.skip(x)) / math.sqrt(2)
        tokens = normed(block.norm2, half).flatten(2)
        q, k, v = block.attn.qkv(tokens.transpose(1, 2)).transpose(1, 2).chunk(3, dim=1)
        weights = torch.softmax(torch.einsum("bdi,bdj->bij", q, k) / 4.0, 2)
        attended = torch.einsum("bij,bdj->bid", weights, v)
        out = block.attn.proj(attended).transpose(1, 2).view(2, 16, 4, 4)
        torch.testing.assert_close(block(x, c), (half + out) / math.sqrt(2))


@pytest.mark.parametrize("kind", ["ddpmpp", "ncsnpp"])
@pytest.mark.parametrize("attention", ["plain", "tmsa"])
def test_every_parameter_learns(kind: Any, attention: Any) -> None:
    shape = replace(SMALL, kind=kind, attention=attention, num_classes=3, augment_labels=9)
    model = _randomized(UNet(replace(shape, dropout=0.3)))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, -0.4]), torch.tensor([0, 3])
    out = model(x, t, y, augment=torch.rand(2, 9), dropout_seeds=torch.tensor([1, 2]))
    assert out.shape == x.shape
    out.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not torch.allclose(model(x, t, y)[0], model(x, t + 1.0, y)[0])
    # Two in the encoder's stage of 8, in the decoder's last, and at the coarsest.
    found = [m for m in model.modules() if isinstance(m, TMSA | SelfAttention)]
    assert [type(m) for m in found] == [TMSA if attention == "tmsa" else SelfAttention] * 3


def test_new_networks_begin_near_zero() -> None:
    zero = torch.zeros(1, dtype=torch.long)
    assert UNet(SMALL)(torch.randn(1, 3, 8, 8), zero.float(), zero).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.tmsa=true"], r"model\.tmsa .*ddpmpp or ncsnpp.* 'image_diffit'"),
        (["model={architecture: ddpmpp, window: 8}"], r"model\.window .*image_diffit.* 'ddpmpp'"),
        (
            ["model.architecture=ddpmpp", "model.attention_resolutions=[12]"],
            r"attention_resolutions has 12, .* 32, 16, 8",
        ),
    ],
)
def test_parts_that_a_network_lacks_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("cifar10", overrides)


def test_recipes_build_them() -> None:
    overrides = ["model={architecture: ncsnpp, conditional: true}", "diffusion.objective=ve"]
    with torch.device("meta"):
        model = build_model(load_recipe("cifar10", overrides))
    assert isinstance(model, UNet)
    assert model.shape.num_classes == 10
