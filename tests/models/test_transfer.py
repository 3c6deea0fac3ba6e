"""Weight transfer to another resolution: what must not change, and what is refused."""

from __future__ import annotations

import pytest
import torch

from diffit_train.errors import UserError
from diffit_train.models.attention import relative_position_index
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.layers import sincos_position_table
from diffit_train.models.transfer import resized_bias_table, transfer_weights

SIZES = {"latent_channels": 2, "out_channels": 4, "num_classes": 3, "hidden_size": 16}
SIZES |= {"depth": 2, "num_heads": 2}


def _offsets(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column offset of each table entry, from the index of pairs."""
    index = relative_position_index(side)
    rows, columns = torch.zeros((2 * side - 1) ** 2), torch.zeros((2 * side - 1) ** 2)
    for a in range(side**2):
        for b in range(side**2):
            rows[index[a, b]] = a // side - b // side
            columns[index[a, b]] = a % side - b % side
    return rows, columns


def test_a_bias_linear_in_the_offset_stays_linear_in_images() -> None:
    rows, columns = _offsets(4)
    table = torch.stack([rows + 10 * columns, columns], dim=1)
    resized = resized_bias_table(table, 8)
    rows, columns = _offsets(8)
    inside = (rows.abs() <= 4) & (columns.abs() <= 4)  # away from the old table's border
    expected = torch.stack([(rows + 10 * columns) / 2, columns / 2], dim=1)
    torch.testing.assert_close(resized[inside], expected[inside], atol=1e-5, rtol=1e-5)


def test_the_same_side_changes_nothing() -> None:
    table = torch.randn(49, 3)
    torch.testing.assert_close(resized_bias_table(table, 4), table, atol=1e-6, rtol=1e-6)


def test_positions_spread_over_the_old_grid() -> None:
    """Every other position of the finer grid equals one of the coarser grid, bit for bit."""
    coarse = sincos_position_table(16, 4).view(4, 4, 16)
    fine = sincos_position_table(16, 8, spread=4).view(8, 8, 16)
    assert torch.equal(fine[::2, ::2], coarse)
    assert fine.abs().max() <= 1.0


def test_weights_transfer_to_twice_the_resolution() -> None:
    small = LatentDiffiT(Shape(latent_size=8, **SIZES))
    large = LatentDiffiT(Shape(latent_size=16, position_side=4, **SIZES))
    weights = {n: p.detach() for n, p in small.named_parameters() if p.requires_grad}
    taken = transfer_weights(large, weights, "small@1")
    missing = large.load_state_dict(taken, strict=False)
    assert not missing.unexpected_keys
    assert taken["blocks.0.attn.relative_position_bias_table"].shape == (225, 2)
    assert torch.equal(taken["blocks.1.mlp.fc1.weight"], weights["blocks.1.mlp.fc1.weight"])


def test_another_model_is_refused() -> None:
    small = LatentDiffiT(Shape(latent_size=8, **SIZES))
    weights = {n: p.detach() for n, p in small.named_parameters() if p.requires_grad}
    wide = LatentDiffiT(Shape(latent_size=8, **SIZES | {"hidden_size": 32}))
    with pytest.raises(
        UserError, match=r"small@1 holds a different model.*\(16,\).*only the resol"
    ):
        transfer_weights(wide, weights, "small@1")
    deep = LatentDiffiT(Shape(latent_size=8, **SIZES | {"depth": 3}))
    with pytest.raises(UserError, match=r"blocks\.2\..* \(missing there\)"):
        transfer_weights(deep, weights, "small@1")
