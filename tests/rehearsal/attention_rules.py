"""Which kernel torch would choose for `scaled_dot_product_attention` on sm_90.

Read in torch 2.13.0: ATen/native/transformers/sdp_utils_cpp.h (in the wheel) and
ATen/native/transformers/cuda/sdp_utils.cpp. The order on sm_90 is cuDNN, flash, memory-efficient,
math; the first that takes the inputs is chosen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Attention:
    """What reached `scaled_dot_product_attention`, as the stand-in notes it.

    Attributes:
        qkv_stride, mask_stride: of the last dimension.
        mask_dims: 0 without a mask.
    """

    dtype: str
    tokens: int
    head: int
    qkv_stride: int
    mask_stride: int = 1
    mask_dims: int = 0
    mask_grad: bool = False
    mask_dtype: str = ""

    @classmethod
    def parse(cls, key: str) -> Attention:
        """From a counter's name."""
        facts = dict(re.findall(r"(\w+)=(\w+)", key))
        numbers = {k: int(v) for k, v in facts.items() if k not in ("dtype", "mask_dtype")}
        numbers["mask_grad"] = bool(numbers.get("mask_grad", 0))
        return cls(**(facts | numbers))  # type: ignore[arg-type]

    def aligned(self) -> Attention:
        """With sizes that kernels take."""
        return replace(self, tokens=256, head=72)


def kernel_on_sm90(given: Attention) -> str:
    """cudnn, flash, efficient or math."""
    half = given.dtype in ("BFloat16", "Half")
    masked = given.mask_dims > 0
    # check_last_dim_stride_equals_1_dense, for every fused kernel
    if given.qkv_stride != 1 or (masked and given.mask_stride != 1):
        return "math"
    # check_attn_mask_shape: no gradient; two or four dimensions
    mask_fits_cudnn = not masked or (given.mask_dims in (2, 4) and not given.mask_grad)
    if half and given.head % 8 == 0 and given.head <= 128 and mask_fits_cudnn:
        return "cudnn"
    # check_for_attn_mask
    if half and given.head % 8 == 0 and given.head <= 256 and not masked:
        return "flash"
    # Rows of 16 bytes; a mask of the dtype of the products.
    alignment = 8 if half else 4
    mask_fits = not masked or (given.mask_dtype == given.dtype and given.tokens % alignment == 0)
    return "efficient" if given.head % alignment == 0 and mask_fits else "math"
