"""Transfer weights between models of the same architecture at different resolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffit_train.errors import UserError

BIAS_TABLE = "relative_position_bias_table"


def resized_bias_table(table: Tensor, side: int) -> Tensor:
    """Resize a relative-position bias table to another grid side.

    Offsets scale with the grid, so attention reaches equally far relative to the image: the new
    entry at offset d is the old table, bicubically interpolated, at d * old side / new side.
    Offsets beyond the old table use its outermost entry.

    Args:
        table: ((2 w - 1)^2, heads), in the layout of `models.attention`; w is the old side.
        side: the new side.

    Returns:
        ((2 side - 1)^2, heads).
    """
    old = (math.isqrt(table.shape[0]) + 1) // 2
    grid = table.T.reshape(1, -1, 2 * old - 1, 2 * old - 1).double()
    offsets = torch.arange(1 - side, side, dtype=torch.float64) * (old / side) / max(1, old - 1)
    rows, columns = torch.meshgrid(offsets, offsets, indexing="ij")
    points = torch.stack([columns, rows], dim=-1).unsqueeze(0)
    resized = F.grid_sample(grid, points, "bicubic", "border", align_corners=True)
    return resized[0].flatten(1).T.to(table.dtype).contiguous()


def check_transfer(model: nn.Module, shapes: Mapping[str, torch.Size], source: str) -> None:
    """Refuse weights that `transfer_weights` could not use.

    Args:
        model: may be on the meta device.
        shapes: shapes of the other model's trainable parameters.

    Raises:
        UserError: the other model differs in more than the size of its token grid.
    """
    wanted = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    wrong = []
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes or name not in wanted:
            wrong.append(f"{name} ({'only there' if name not in wanted else 'missing there'})")
        elif shapes[name] != wanted[name] and not (
            name.endswith(BIAS_TABLE) and shapes[name][1] == wanted[name][1]
        ):
            wrong.append(f"{name} (there {tuple(shapes[name])}, here {tuple(wanted[name])})")
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(
            f"{source} holds a different model than the recipe's: {', '.join(wrong[:6])}{more}; "
            "only the resolution may differ"
        )


def transfer_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Weights for all trainable parameters of `model`, from those of another model.

    Raises:
        UserError: as `check_transfer`.
    """
    check_transfer(model, {name: value.shape for name, value in weights.items()}, source)
    out = dict(weights)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.shape != weights[name].shape:
            side = (math.isqrt(parameter.shape[0]) + 1) // 2
            out[name] = resized_bias_table(weights[name], side)
    return out
