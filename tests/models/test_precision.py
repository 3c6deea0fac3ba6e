"""Under bf16 neither the noisy latents nor the fixed positions are rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffit_train.config.train import Train
from diffit_train.models.dit import DiT, DiTWithTMSA
from diffit_train.models.latent import LatentDiffiT, LatentTransformer, Shape
from diffit_train.models.layers import PatchEmbed, sincos_position_table
from diffit_train.models.precision import arithmetic
from diffit_train.training.engine import Engine
from tests.training.ranks import on_ranks

SHAPE = Shape(
    latent_size=8, latent_channels=3, out_channels=6, num_classes=5, hidden_size=16, depth=2,
    num_heads=2,
)  # fmt: skip
ARCHITECTURES = (LatentDiffiT, DiT, DiTWithTMSA)


def _model(architecture: type[LatentTransformer] = LatentDiffiT) -> LatentTransformer:
    torch.manual_seed(0)
    model = architecture(SHAPE)
    nn.init.normal_(model.x_embedder.proj.bias)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents that carry information only in their differences from the nearest bf16 values."""
    generator = torch.Generator().manual_seed(1)
    x = 1.0 + torch.randn(2, 3, 8, 8, generator=generator) * 2.0**-10
    return x, torch.tensor([0, 700]), torch.tensor([1, 5])


def _tokens(model: LatentTransformer, x: torch.Tensor, weights: torch.dtype) -> torch.Tensor:
    """The first block's input in float64, from weights rounded to a dtype."""
    proj = model.x_embedder.proj
    weight, bias = (p.detach().to(weights).double() for p in (proj.weight, proj.bias))
    patches = F.unfold(x.double(), SHAPE.patch_size, stride=SHAPE.patch_size).transpose(1, 2)
    table = sincos_position_table(SHAPE.hidden_size, SHAPE.side).double()
    return patches @ weight.flatten(1).T + bias + table


def _check_engine(
    rank: int, world: int, stage: int, precision: str, architecture: type[LatentTransformer]
) -> None:
    model = _model(architecture)
    plain = copy.deepcopy(model)
    seen: dict[str, torch.Tensor] = {}
    model.x_embedder.register_forward_hook(
        lambda module, args, out: seen.update(latents=args[0], patches=out.detach())
    )
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    train = Train(steps=9, batch_size=2, zero_stage=stage, precision=precision)
    engine = Engine(model, train, rank, world, torch.device("cpu"))
    x, t, y = _batch()
    out = engine.forward(x, t, y)
    rounded = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = _tokens(plain, x, rounded)
    assert torch.equal(seen["latents"], x)
    patches = expected - sincos_position_table(SHAPE.hidden_size, SHAPE.side).double()
    torch.testing.assert_close(seen["patches"].double(), patches, atol=2e-6, rtol=2e-6)
    tolerance = {torch.bfloat16: 2.0**-8, torch.float32: 2e-6}[rounded]
    assert seen["tokens"].dtype == rounded
    torch.testing.assert_close(seen["tokens"].double(), expected, atol=2e-6, rtol=tolerance)
    engine.backward(out.square().sum())
    assert engine.step(0)
    # As in evaluation: a new model, in fp32.
    assert torch.equal(model.pos_embed, architecture(SHAPE).pos_embed)
    assert model.pos_embed.dtype == torch.float32
    engine.destroy()


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, "bf16"), (2, "bf16"), (3, "bf16"), (0, "bf16_autocast"), (3, "bf16_autocast")],
)
def test_training_in_bf16_sees_latents_and_positions_in_fp32(stage: int, precision: str) -> None:
    on_ranks(2, _check_engine, stage, precision, LatentDiffiT)


@pytest.mark.parametrize("architecture", [DiT, DiTWithTMSA])
def test_the_other_models_do_the_same(architecture: type[LatentTransformer]) -> None:
    on_ranks(2, _check_engine, 3, "bf16", architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.float])
def test_a_converted_model_keeps_its_positions(
    architecture: type[LatentTransformer], convert: object
) -> None:
    model, table = _model(architecture), _model(architecture).pos_embed
    assert callable(convert)
    convert(model)
    assert torch.equal(model.pos_embed, table)
    assert model.pos_embed.dtype == torch.float32
    assert "pos_embed" in model.state_dict()
    assert model.double().pos_embed.dtype == torch.float64
    model.to("meta")
    assert model.pos_embed.is_meta
    assert model(*(part.to("meta") for part in _batch())).shape == (2, 6, 8, 8)


def _allowed() -> tuple[bool, bool, bool]:
    """TF32 in matrix products and in convolutions, and autocast."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    return products.allow_tf32, convolutions.allow_tf32, torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", (False, False, False)),
        ("tf32", (True, True, False)),
        ("bf16_autocast", (False, False, True)),
    ],
)
def test_arithmetic_holds_in_the_block_only(
    precision: str, expected: tuple[bool, bool, bool]
) -> None:
    # PyTorch's defaults: on a GPU, an "fp32" convolution is TF32.
    assert _allowed() == (False, True, False)
    with arithmetic(precision, torch.device("cpu")):
        assert _allowed() == expected
    with pytest.raises(ValueError, match="inside"), arithmetic(precision, torch.device("cpu")):
        raise ValueError("inside")
    assert _allowed() == (False, True, False)


def test_compiled_blocks_get_the_same_tokens() -> None:
    x, t, y = _batch()
    plain, compiled = (_model().bfloat16() for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend="eager")
    assert torch.equal(compiled(x, t, y), plain(x, t, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_rounding_the_patch_embedding_is_a_plain_convolution(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(3, 2, 16).to(dtype)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    plain = nn.Conv2d(3, 16, 2, stride=2).to(dtype)
    plain.load_state_dict(embed.proj.state_dict())
    assert torch.equal(embed(x), plain(x).flatten(2).transpose(1, 2))
