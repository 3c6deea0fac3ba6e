"""Named sizes of the transformer, for `model.preset`.

They are part of the configuration so that reading a recipe does not import torch.
"""

from __future__ import annotations

from typing import Any

# DiT's sizes: hidden size, depth, heads. DiffiT's published 561M weights are size XL.
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}


def _preset(architecture: str, size: str, **changes: Any) -> dict[str, Any]:
    hidden_size, depth, num_heads = _SIZES[size]
    values = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
    return {"architecture": architecture, "patch_size": 2, "mlp_ratio": 4.0, **values, **changes}


PRESETS: dict[str, dict[str, Any]] = {
    **{f"diffit_{size}": _preset("diffit", size) for size in _SIZES},
    # Depth from appendix H.2; the published weights have 28 blocks.
    "diffit_xl_depth30": _preset("diffit", "xl", depth=30),
    **{f"dit_{size}": _preset("dit", size) for size in _SIZES},
    **{f"dit_tmsa_{size}": _preset("dit_tmsa", size) for size in _SIZES},
}

# Table 9 of the paper, at 256x256: million parameters, GFLOPs (multiply-adds), FID.
PAPER_COSTS: dict[str, tuple[float, float, float]] = {
    "dit_xl": (675, 119, 2.27),
    "diffit_xl": (561, 114, 1.73),
}
