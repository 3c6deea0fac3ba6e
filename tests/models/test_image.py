"""The image-space DiffiT: the paper's shapes, and its cell against a computation by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit_train.config import load_recipe
from diffit_train.errors import UserError
from diffit_train.models.attention import TMSA, NoTimeConditioning, SeparateTime, TimeInBias
from diffit_train.models.backbone import trainable_parameters
from diffit_train.models.build import build_model
from diffit_train.models.cost import activation_bytes, multiply_adds
from diffit_train.models.image import ImageDiffiT, ImageShape, ResBlock
from diffit_train.models.layers import keyed_dropout, layer_seeds
from diffit_train.models.wrap import checkpoint_activations, compile_blocks, use_kernel

SMALL = ImageShape(
    resolution=16, channels=(8, 16), blocks=(1, 2), window=4, head_size=8, time_size=12
)


def _randomized(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _shapes(recipe_name: str, *overrides: str) -> list[tuple[int, int]]:
    """(side, channels) after tokenizer, resampling and blocks of each stage, and head."""
    with torch.device("meta"):
        model = build_model(load_recipe(recipe_name, list(overrides)))
        seen: list[tuple[int, int]] = []

        def note(module: nn.Module, given: Any, out: Tensor) -> None:
            seen.append((out.shape[-1], out.shape[1]))

        assert isinstance(model, ImageDiffiT)
        watched = [model.tokenizer, model.head]
        for stage in [*model.encoder, *model.decoder]:
            watched += [stage.resample, model.blocks[stage.first + stage.count - 1]]
        for module in watched:
            module.register_forward_hook(note)
        zero = torch.zeros(1, dtype=torch.long)
        model(torch.zeros(1, *model.input_shape), zero, zero)
    return seen


def test_ffhq_has_the_shapes_of_tables_s2_and_s3() -> None:
    encoder = [(64, 128), (64, 128), (64, 128), (32, 128), (32, 256), (16, 256), (16, 256)]
    # Table S.2 prints 16x16x128 before the third stage; appendix I.1 keeps the channels constant.
    encoder += [(8, 256), (8, 256)]
    decoder = [(16, 256), (16, 256), (32, 256), (32, 256), (64, 256), (64, 128), (64, 3)]
    assert _shapes("ffhq64") == encoder + decoder


def test_cifar_has_three_resolutions() -> None:
    expected = [(32, 128), (32, 128), (32, 128), (16, 128), (16, 256), (8, 256), (8, 256)]
    expected += [(16, 256), (16, 256), (32, 256), (32, 128), (32, 3)]
    assert _shapes("cifar10") == expected
    assert _shapes("cifar10", "model.blocks=[2,2,2]") == expected
    assert _shapes("cifar10", "model.resample=bilinear") == expected


@pytest.mark.parametrize(
    ("name", "blocks", "parameters"),
    [
        ("cifar10", "[4,4,4]", 29_868_291),
        ("cifar10", "[2,2,2]", 17_054_915),
        ("ffhq64", "[4,4,4,4]", 46_451_779),
        ("ffhq64", "[1,2,2,2]", 25_439_707),
    ],
)
def test_published_block_counts(name: str, blocks: str, parameters: int) -> None:
    recipe = load_recipe(name, [f"model.blocks={blocks}"])
    with torch.device("meta"):
        model = build_model(recipe)
    assert trainable_parameters(model) == parameters
    # Encoder and decoder, the coarsest stage once.
    counts = recipe.model.blocks
    assert len(model.blocks) == sum(counts) + sum(counts[:-1])


def _by_hand(block: ResBlock, x: Tensor, c: Tensor, window: int) -> Tensor:
    """Equations 3 to 10 for one image, token by token; x (D, h, w), c (T,)."""
    width, side, _ = x.shape
    groups = block.norm.num_groups
    grouped = x.reshape(groups, -1)
    normed = (grouped - grouped.mean(1, keepdim=True)) / torch.sqrt(
        grouped.var(1, unbiased=False, keepdim=True) + 1e-6
    )
    normed = normed.reshape(x.shape) * block.norm.weight[:, None, None]
    normed = normed + block.norm.bias[:, None, None]
    swish = normed * torch.sigmoid(normed)
    padded = F.pad(swish, (1, 1, 1, 1))
    hat = torch.zeros_like(x)
    for row in range(side):
        for column in range(side):
            patch = padded[:, row : row + 3, column : column + 3]
            hat[:, row, column] = (block.conv.weight * patch).sum((1, 2, 3)) + block.conv.bias
    inner, attn = block.block, block.block.attn
    out = torch.zeros_like(x)
    heads = attn.num_heads
    size = width // heads

    def norm(v: Tensor) -> Tensor:
        return (v - v.mean()) / torch.sqrt(v.var(unbiased=False) + 1e-6)

    def project(v: Tensor) -> Tensor:
        return attn.qkv.weight @ v + attn.qkv.bias + attn.qkv_temb.weight @ c + attn.qkv_temb.bias

    for top in range(0, side, window):
        for left in range(0, side, window):
            cells = [(top + i, left + j) for i in range(window) for j in range(window)]
            qkv = {cell: project(norm(hat[:, cell[0], cell[1]])) for cell in cells}
            for a in cells:
                attended = []
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    logits = []
                    for b in cells:
                        offset = (a[0] - b[0] + window - 1) * (2 * window - 1)
                        offset += a[1] - b[1] + window - 1
                        dot = qkv[a][:width][part] @ qkv[b][width : 2 * width][part]
                        bias = attn.relative_position_bias_table[offset, head]
                        logits.append(dot / math.sqrt(size) + bias)
                    weights = torch.softmax(torch.stack(logits), 0)
                    values = torch.stack([qkv[b][2 * width :][part] for b in cells])
                    attended.append(weights @ values)
                token = hat[:, a[0], a[1]]
                token = token + attn.proj.weight @ torch.cat(attended) + attn.proj.bias
                hidden = inner.mlp.fc1.weight @ norm(token) + inner.mlp.fc1.bias
                hidden = F.gelu(hidden, approximate="tanh")
                out[:, a[0], a[1]] = token + inner.mlp.fc2.weight @ hidden + inner.mlp.fc2.bias
    return x + out


@pytest.mark.parametrize("kernel", ["reference", "sdpa", "chunked"])
def test_the_residual_cell_follows_the_equations(kernel: str) -> None:
    shape = replace(SMALL, window=2)
    block = _randomized(ResBlock(shape, 16, 4)).double()
    use_kernel(block, kernel, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 4, 4, generator=generator, dtype=torch.float64)
    c = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([_by_hand(block, *pair, 2) for pair in zip(x, c, strict=True)])
        torch.testing.assert_close(block(x, c), expected)


@pytest.mark.parametrize("kind", [TMSA, SeparateTime, TimeInBias, NoTimeConditioning])
def test_windows_do_not_see_each_other(kind: type[TMSA]) -> None:
    attention = _randomized(kind(8, 2, side=8, window=4, condition_size=6))
    x, c = torch.randn(2, 64, 8, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    out = attention(x, c).view(2, 8, 8, 8)
    (grad,) = torch.autograd.grad(out[0, 5, 2].sum(), x, retain_graph=True)
    touched = grad.view(2, 8, 8, 8).abs().sum(-1) > 0
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[0, 4:, :4] = True
    assert torch.equal(touched, expected)
    found = torch.autograd.grad(out[0].sum(), c, allow_unused=True)[0]
    if kind is NoTimeConditioning:
        assert found is None
    else:
        assert found[0].abs().sum() > 0 == found[1].abs().sum()


def test_time_in_the_bias_is_an_offset_of_the_table() -> None:
    """An image's offsets, added to the table by hand, give the untimed attention's output."""
    timed = _randomized(TimeInBias(8, 2, side=4, window=2, condition_size=6))
    plain = NoTimeConditioning(8, 2, side=4, window=2, condition_size=6)
    plain.load_state_dict(timed.state_dict(), strict=False)
    x, c = torch.randn(3, 16, 8), torch.randn(3, 6)
    with torch.no_grad():
        found = timed(x, c)
        for i in range(3):
            offset = timed.bias_temb(c[i]).view(9, 2)
            plain.relative_position_bias_table.copy_(timed.relative_position_bias_table + offset)
            torch.testing.assert_close(found[i : i + 1], plain(x[i : i + 1], c[i : i + 1]))


def test_separate_time_is_the_value_of_a_lone_token() -> None:
    attention = _randomized(SeparateTime(8, 2, side=4, condition_size=6))
    x, c = torch.randn(2, 16, 8), torch.randn(2, 6)
    with torch.no_grad():
        value = attention.v_temb(c) @ attention.proj.weight.T
        silent = attention(x, torch.zeros(2, 6))
        bias = attention.v_temb.bias @ attention.proj.weight.T
        torch.testing.assert_close(attention(x, c), silent - bias + value[:, None])


PARTS = [
    *[{"time": time} for time in ("tmsa", "separate", "bias", "mlp")],
    {"time_embedding": "fourier"},
    {"resample": "bilinear"},
    {"encoder": "vit", "decoder": "setr_mla"},
    {"encoder": "multi_resolution", "decoder": "setr_mla"},
    {"encoder": "multi_resolution", "decoder": "multi_resolution"},
    {"decoder": "multi_resolution"},
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_every_part_learns_from_time_and_reaches_the_output(part: dict[str, str]) -> None:
    model = _randomized(ImageDiffiT(replace(SMALL, **part)))
    x, y = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
    t = torch.tensor([0.1, 0.7])
    out = model(x, t, y)
    assert out.shape == (2, 3, 16, 16)
    out.square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert not torch.allclose(out[0], model(x, t + 1.0, y)[0])


def test_the_first_prediction_is_zero() -> None:
    zero = torch.zeros(1, dtype=torch.long)
    assert not ImageDiffiT(SMALL)(torch.randn(1, 3, 16, 16), zero, zero).any()


def test_labels_and_augmentation_condition_the_model() -> None:
    model = _randomized(ImageDiffiT(replace(SMALL, num_classes=3, augment_labels=9)))
    x, t = torch.randn(2, 3, 16, 16), torch.zeros(2)
    one, two = (model(x, t, torch.full((2,), label)) for label in (1, 3))
    assert not torch.allclose(one, two)
    label = torch.ones(2, dtype=torch.long)
    assert not torch.allclose(one, model(x, t, label, augment=torch.ones(2, 9)))
    # Zeros are what an image is generated with: as if there were no augmentation.
    torch.testing.assert_close(one, model(x, t, label, augment=torch.zeros(2, 9)))


def test_dropout_depends_on_the_image_alone() -> None:
    x, images = torch.ones(3, 8, 40, 40), torch.tensor([5, 6, 2**31 - 1])
    seeds = layer_seeds(images, 5)
    dropped = keyed_dropout(x, 0.2, seeds[3])
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(keyed_dropout(x[:1], 0.2, seeds[3, 1:2]), dropped[1:2])
    # Masks of other images and layers agree as often as independent ones: 0.8^2 + 0.2^2.
    others = [dropped[1], keyed_dropout(x[:1], 0.2, seeds[4, :1])[0]]
    others += [dropped[0].flatten().roll(shift).view(8, 40, 40) for shift in (1, 40, 1600)]
    for other in others:
        assert float((other == dropped[0]).float().mean()) == pytest.approx(0.68, abs=0.02)


def test_dropout_only_with_seeds_and_alike_when_recomputed() -> None:
    shape = replace(SMALL, dropout=0.5)
    x, y, t = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long), torch.zeros(2)
    seeds = torch.tensor([1, 2])
    results = []
    for mode in ("none", "blocks", "selective"):
        model = _randomized(ImageDiffiT(shape)).train()
        checkpoint_activations(model, mode)
        out = model(x, t, y, dropout_seeds=seeds)
        out.sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
        assert torch.equal(model(x, t, y), model(x, t, y))
        assert not torch.allclose(out, model(x, t, y))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_compiled_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda block, **options: plain(block, backend="eager", **options)
    )
    model = _randomized(ImageDiffiT(replace(SMALL, channels=(8,), blocks=(1,))))
    x, y, t = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long), torch.zeros(2)
    with torch.no_grad():
        expected = model(x, t, y)
        compile_blocks(model)
        torch.testing.assert_close(model(x, t, y), expected)


def test_costs_are_counted() -> None:
    with torch.device("meta"):
        model = ImageDiffiT(ImageShape(blocks=(1, 1, 1)))
    total, products = multiply_adds(model)
    # Windows of 16 tokens: 2 products of 16 D for each token of the five blocks.
    counted = 2 * 16 * (2 * 1024 * 128 + 2 * 256 * 256 + 64 * 256)
    assert products == counted
    convolution = 9 * (2 * 1024 * 128**2 + 2 * 256 * 256**2 + 64 * 256**2)
    assert convolution < total
    kept = {
        mode: activation_bytes(model, 2, mode, 1, torch.float32)
        for mode in ("none", "selective", "blocks")
    }
    assert kept["none"] > kept["selective"] > kept["blocks"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.window=3", r"window is 3, but must divide the resolution 32 of stage 1 \(32"),
        ("model.window=16", r"window is 16, but must divide the resolution 8 of stage 3 \(8"),
        ("data.resolution=30", r"data\.resolution is 30, but the 3 stages .* multiple of 4"),
        ("model.blocks=[1,2]", r"blocks has 2 stages, but model\.channels has 3"),
        ("model.head_size=48", r"head_size is 48, but must divide .* \(128\)"),
        (
            "model.hidden_size=64",
            r"model\.hidden_size .*architecture=diffit or .* 'image_diffit'",
        ),
        ("model.encoder=vit", r"model\.decoder .*'setr_mla' .*model\.encoder"),
        ("autoencoder={kind: kl, source: a/b}", r"works on pixels, but autoencoder\.kind is 'kl'"),
        (
            "model={architecture: image_diffit, encoder: multi_resolution, "
            "decoder: multi_resolution, time: mlp}",
            r"model\.time is 'mlp', .*model\.encoder",
        ),
    ],
)
def test_impossible_models_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("cifar10", [override])


def test_latent_models_lack_these_parts() -> None:
    with pytest.raises(UserError, match=r"model\.time .*image_diffit.* 'diffit'"):
        load_recipe("imagenet256", ["model.time=mlp"])
    with pytest.raises(UserError, match=r"train\.augment is 0\.1.*model\.architecture"):
        load_recipe("imagenet256", ["train.augment=0.1"])
