"""The latent DiffiT against an independent float64 implementation, and published counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffit_train.config import load_recipe
from diffit_train.models.attention import TMSA, relative_position_index
from diffit_train.models.backbone import trainable_parameters
from diffit_train.models.build import build_model
from diffit_train.models.dit import DiT, DiTBlock
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.layers import TimestepEmbedder, sincos_position_table, unpatchify


def _linear(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def _tmsa_by_loops(module: TMSA, x: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Equations 3 to 6, one head, one query and one key at a time."""
    batch, count, hidden = x.shape
    heads, side = module.num_heads, module.side
    size = hidden // heads
    qkv = _linear(module.qkv, x) + _linear(module.qkv_temb, c)[:, None]
    table = module.relative_position_bias_table.detach().numpy()
    out = np.zeros_like(x)
    for b in range(batch):
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            q, k, v = (qkv[b, :, i * hidden : (i + 1) * hidden][:, columns] for i in range(3))
            for i in range(count):
                logits = np.zeros(count)
                for j in range(count):
                    rows = i // side - j // side + side - 1
                    cols = i % side - j % side + side - 1
                    bias = table[rows * (2 * side - 1) + cols, head]
                    logits[j] = q[i] @ k[j] / np.sqrt(size) + bias
                weights = np.exp(logits - logits.max())
                out[b, i, columns] = (weights / weights.sum()) @ v
    return _linear(module.proj, out)


def test_tmsa_follows_the_equations() -> None:
    torch.manual_seed(0)
    module = TMSA(hidden_size=12, num_heads=3, side=3).double()
    nn.init.normal_(module.relative_position_bias_table)
    nn.init.normal_(module.qkv_temb.bias)
    x, c = torch.randn(2, 9, 12).double(), torch.randn(2, 12).double()
    expected = _tmsa_by_loops(module, x.numpy(), c.numpy())
    np.testing.assert_allclose(module(x, c).detach().numpy(), expected, atol=1e-12)


def test_tmsa_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    module = TMSA(hidden_size=8, num_heads=2, side=2).double()
    x, c = torch.randn(1, 4, 8).double(), torch.randn(1, 8).double()
    table = module.relative_position_bias_table

    def with_table(values: torch.Tensor, tokens: torch.Tensor, condition: torch.Tensor):
        named = {"relative_position_bias_table": values}
        return torch.func.functional_call(module, named, (tokens, condition))

    inputs = [t.detach().requires_grad_() for t in (table, x, c)]
    assert torch.autograd.gradcheck(with_table, inputs)


def test_relative_position_index_of_two_by_two() -> None:
    # Tokens 0 1 / 2 3; offsets (-1..1, -1..1) in row order.
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_position_index(2).tolist() == expected


@pytest.mark.parametrize(("latent_size", "count"), [(32, 561_035_232), (64, 562_382_816)])
def test_published_parameter_counts(latent_size: int, count: int) -> None:
    with torch.device("meta"):
        assert trainable_parameters(LatentDiffiT(Shape(latent_size=latent_size))) == count


def test_published_names() -> None:
    with torch.device("meta"):
        names = set(LatentDiffiT(Shape(depth=1)).state_dict())
    attention = ["qkv.weight", "qkv.bias", "qkv_temb.weight", "qkv_temb.bias", "proj.weight"]
    attention += ["proj.bias", "relative_position_bias_table", "relative_position_index"]
    expected = {f"blocks.0.attn.{name}" for name in attention}
    expected |= {
        f"blocks.0.mlp.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    for layer in ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"):
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    expected |= {"pos_embed", "y_embedder.embedding_table.weight"}
    assert names == expected


def _small(**changes: int | None) -> LatentDiffiT:
    sizes = {"latent_size": 8, "latent_channels": 3, "out_channels": 6, "num_classes": 5}
    sizes |= {"hidden_size": 16, "depth": 2, "num_heads": 2}
    return LatentDiffiT(Shape(**{**sizes, **changes}))


def test_the_first_prediction_is_zero_and_has_twice_the_channels() -> None:
    out = _small()(torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 5]))
    assert out.shape == (2, 6, 8, 8)
    assert (out == 0).all()


def test_time_label_and_input_all_matter() -> None:
    torch.manual_seed(0)
    model = _small()
    nn.init.normal_(model.final_layer.linear.weight)
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([10]), torch.tensor([1])
    base = model(x, t, y)
    for changed in ((x + 1, t, y), (x, t + 1, y), (x, t, y + 1)):
        assert (model(*changed) - base).abs().max() > 1e-4


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="patch size 3 .* 8"):
        _small(patch_size=3)
    with pytest.raises(ValueError, match="3 .*hidden_size 16"):
        _small(num_heads=3)


def test_unpatchify_undoes_the_patches_of_a_convolution() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = nn.functional.unfold(x, 2, stride=2)  # (2, 3 * 4, 4), channel first in a patch
    tokens = patches.view(2, 3, 4, 4).permute(0, 3, 2, 1).reshape(2, 4, 12)
    assert torch.equal(unpatchify(tokens, 2, 3), x)


def test_timestep_features_put_cosines_first() -> None:
    embedder = TimestepEmbedder(8)
    seen: list[torch.Tensor] = []
    embedder.mlp[0].register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    embedder(torch.tensor([0, 7]))
    frequency = 10000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate([np.cos(7 * frequency), np.sin(7 * frequency)])
    np.testing.assert_allclose(seen[0][1].numpy(), expected, atol=2e-6)
    np.testing.assert_array_equal(seen[0][0].numpy(), [1.0] * 128 + [0.0] * 128)


def test_positions_are_sines_and_cosines_of_column_then_row() -> None:
    table = sincos_position_table(8, 3)[0].numpy()
    row, column, frequency = 2, 1, np.array([1.0, 1e-2])
    expected = [np.sin(column * frequency), np.cos(column * frequency)]
    expected += [np.sin(row * frequency), np.cos(row * frequency)]
    np.testing.assert_allclose(table[row * 3 + column], np.concatenate(expected), atol=1e-6)


# ---- The whole model, reimplemented from the equations in float64 ----


def _norm(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def _apply(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def _attention_by_einsum(
    weights: dict[str, torch.Tensor], name: str, x: torch.Tensor, c: torch.Tensor, heads: int
) -> torch.Tensor:
    batch, count, width = x.shape
    side, size = round(count**0.5), width // heads
    qkv = _apply(weights, f"{name}.qkv", x) + _apply(weights, f"{name}.qkv_temb", c)[:, None]
    q, k, v = (part.reshape(batch, count, heads, size) for part in qkv.split(width, dim=-1))
    row, column = np.divmod(np.arange(count), side)
    rows = (row[:, None] - row + side - 1) * (2 * side - 1) + column[:, None] - column + side - 1
    bias = weights[f"{name}.relative_position_bias_table"][torch.from_numpy(rows)]  # (N, N, H)
    logits = torch.einsum("bihk,bjhk->bijh", q, k) / size**0.5 + bias
    exponential = torch.exp(logits - logits.amax(2, keepdim=True))
    attended = torch.einsum("bijh,bjhk->bihk", exponential / exponential.sum(2, keepdim=True), v)
    return _apply(weights, f"{name}.proj", attended.reshape(batch, count, width))


def _model_by_equations(
    weights: dict[str, torch.Tensor],
    shape: Shape,
    x: torch.Tensor,
    t: torch.Tensor,
    y: torch.Tensor,
) -> torch.Tensor:
    patch, side, channels = shape.patch_size, shape.side, shape.latent_channels
    frequency = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = t.double()[:, None] * frequency
    c = _apply(weights, "t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))
    c = _apply(weights, "t_embedder.mlp.2", c / (1 + torch.exp(-c)))
    if shape.num_classes is not None:
        c = c + weights["y_embedder.embedding_table.weight"][y]
    cut = x.view(len(x), channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    kernel = weights["x_embedder.proj.weight"].reshape(shape.hidden_size, -1)
    tokens = cut.reshape(len(x), side**2, -1) @ kernel.T + weights["x_embedder.proj.bias"]
    tokens = tokens + weights["pos_embed"]
    for number in range(shape.depth):
        name = f"blocks.{number}"
        normed = _norm(tokens)
        tokens = tokens + _attention_by_einsum(weights, f"{name}.attn", normed, c, shape.num_heads)
        inner = _apply(weights, f"{name}.mlp.fc1", _norm(tokens))
        cubic = (2 / np.pi) ** 0.5 * (inner + 0.044715 * inner**3)
        tokens = tokens + _apply(weights, f"{name}.mlp.fc2", inner * 0.5 * (1 + torch.tanh(cubic)))
    normed = _norm(tokens)
    out = _apply(weights, "final_layer.linear", normed / (1 + torch.exp(-normed)))
    out = out.view(len(x), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(len(x), -1, side * patch, side * patch)


@pytest.mark.parametrize("labels", [True, False])
def test_the_whole_model_and_its_gradients_follow_the_equations(labels: bool) -> None:
    torch.manual_seed(0)
    model = _small(num_classes=5 if labels else None).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, t, y = torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 421, 999]), torch.tensor([0, 2, 5])
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    fixed = {"pos_embed": model.pos_embed}
    expected = _model_by_equations(weights | fixed, model.shape, x, t, y)
    out = model(x, t, y)
    # Time features are float32 by design.
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)
    target = torch.randn_like(out)
    (out * target).sum().backward()
    (expected * target).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = max(1.0, float(weights[name].grad.abs().max()))
            mine, exact = parameter.grad / scale, weights[name].grad / scale
            torch.testing.assert_close(mine, exact, atol=1e-4, rtol=0, msg=name)


# ---- Variants ----


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("diffit_s", None),
        ("diffit_b", None),
        ("diffit_l", None),
        ("diffit_xl", 561_035_232),
        ("diffit_xl_depth30", 600_906_752),
        # fast-DiT prints 675,129,632 with the fixed table of 256 x 1152 positions.
        ("dit_xl", 675_129_632 - 256 * 1152),
        ("dit_tmsa_xl", 561_035_232),
    ],
)
def test_presets(preset: str, count: int | None) -> None:
    recipe = load_recipe("imagenet256", [f"model.preset={preset}"])
    with torch.device("meta"):
        found = trainable_parameters(build_model(recipe))
    if count is not None:
        assert found == count
    else:
        assert found < 561_035_232


def test_a_dit_block_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    model = DiT(Shape(latent_size=8, num_classes=5, hidden_size=16, depth=2, num_heads=2))
    x, c = torch.randn(2, 16, 16), torch.randn(2, 16)
    assert torch.equal(model.blocks[0](x, c), x)
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 5]))
    assert (out == 0).all()
    assert out.shape == (2, 8, 8, 8)


def test_a_dit_block_follows_adaln_zero() -> None:
    torch.manual_seed(0)
    shape = Shape(latent_size=4, num_classes=5, hidden_size=8, depth=1, num_heads=2)
    block = DiTBlock(shape).double()
    x, c = torch.randn(2, 4, 8).double(), torch.randn(2, 8).double()
    weights = dict(block.named_parameters())
    parts = _apply(weights, "adaLN_modulation.1", c / (1 + torch.exp(-c))).view(2, 6, 1, 8)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts.unbind(1)
    h = _norm(x) * (1 + scale1) + shift1
    q, k, v = _apply(weights, "attn.qkv", h).view(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
    attended = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, 4, 8)
    expected = x + gate1 * _apply(weights, "attn.proj", attended)
    h = _apply(weights, "mlp.fc1", _norm(expected) * (1 + scale2) + shift2)
    h = nn.functional.gelu(h, approximate="tanh")
    expected = expected + gate2 * _apply(weights, "mlp.fc2", h)
    torch.testing.assert_close(block(x, c), expected)
