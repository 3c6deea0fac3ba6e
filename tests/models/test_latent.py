"""The latent DiffiT against the equations, computed apart in float64, and the published counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffit_train.models.attention import TMSA, relative_position_index
from diffit_train.models.latent import LatentDiffiT, trainable_parameters
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


def test_tmsa_gradients_are_those_of_its_function() -> None:
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
        assert trainable_parameters(LatentDiffiT(latent_size=latent_size)) == count


def test_published_names() -> None:
    with torch.device("meta"):
        names = set(LatentDiffiT(depth=1).state_dict())
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


def _small(**changes: int) -> LatentDiffiT:
    sizes = {"latent_size": 8, "latent_channels": 3, "num_classes": 5, "patch_size": 2}
    sizes |= {"hidden_size": 16, "depth": 2, "num_heads": 2}
    return LatentDiffiT(**{**sizes, **changes})


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


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="patch size 3 does not divide latent size 8"):
        _small(patch_size=3)
    with pytest.raises(ValueError, match="3 heads do not divide hidden_size 16"):
        _small(num_heads=3)


def test_unpatchify_undoes_the_patches_of_a_convolution() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = nn.functional.unfold(x, 2, stride=2)  # (2, 3 * 4, 4), channel first in a patch
    tokens = patches.view(2, 3, 4, 4).permute(0, 3, 2, 1).reshape(2, 4, 12)
    assert torch.equal(unpatchify(tokens, 2, 3), x)


def test_timestep_features_hold_cosines_first() -> None:
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
