"""What reaches attention on a GPU, and which kernel takes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from diffit_train.models import attention_kernels
from diffit_train.models.attention import TMSA, TimeInBias, relative_position_index
from diffit_train.models.attention_kernels import position_bias
from tests.rehearsal.attention_rules import Attention, kernel_on_sm90

BIASED = Attention(
    "BFloat16", 256, 72, 1, mask_stride=1, mask_dims=4, mask_grad=True, mask_dtype="BFloat16"
)


def test_the_rules_for_sm90() -> None:
    assert kernel_on_sm90(BIASED) == "efficient"
    assert kernel_on_sm90(replace(BIASED, mask_stride=16)) == "math"
    assert kernel_on_sm90(replace(BIASED, mask_grad=False)) == "cudnn"
    assert kernel_on_sm90(replace(BIASED, mask_grad=False, mask_dims=3)) == "efficient"
    assert kernel_on_sm90(replace(BIASED, dtype="Float", mask_dtype="Float")) == "efficient"
    assert kernel_on_sm90(replace(BIASED, mask_dtype="Float")) == "math"


def _seen(monkeypatch: pytest.MonkeyPatch) -> list[Attention]:
    """What a forward pass gives to attention."""
    found: list[Attention] = []

    def note(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        given = Attention(
            str(q.dtype), q.shape[-2], q.shape[-1], max(t.stride(-1) for t in (q, k, v))
        )
        if attn_mask is not None:
            given = replace(
                given,
                mask_stride=attn_mask.stride(-1),
                mask_dims=attn_mask.dim(),
                mask_grad=attn_mask.requires_grad,
                mask_dtype=str(attn_mask.dtype),
            )
        found.append(given)
        return v  # of the right shape; not every CPU computes attention in bf16

    monkeypatch.setattr(functional, "scaled_dot_product_attention", note)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 4], ids=["whole", "windows"])
@pytest.mark.parametrize("kind", [TMSA, TimeInBias])
def test_a_bias_never_keeps_fused_kernels_away(
    kind: type[TMSA], window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _seen(monkeypatch)
    attention = kind(16, 2, side=8, window=window, condition_size=6).to(dtype)
    attention.kernel = attention_kernels.sdpa_attention
    x, c = torch.randn(2, 64, 16, dtype=dtype), torch.randn(2, 6, dtype=dtype)
    attention(x, c)
    with torch.no_grad():
        attention(x, c)
    training, evaluating = seen
    assert (training.qkv_stride, training.mask_stride) == (1, 1)
    assert training.mask_dtype == training.dtype == str(dtype)
    # cuDNN's kernel takes masks of four dimensions without a gradient.
    assert (evaluating.mask_dims, evaluating.mask_grad) == (4, False)


@pytest.mark.parametrize("lead", [(), (3,)], ids=["shared", "per image"])
@pytest.mark.parametrize("side", [1, 3, 4])
def test_the_bias_and_its_gradient_are_those_of_indexing(side: int, lead: tuple[int, ...]) -> None:
    index = relative_position_index(side)
    table = torch.randn(*lead, (2 * side - 1) ** 2, 2, dtype=torch.float64, requires_grad=True)
    plain = table[..., index.view(-1), :].unflatten(-2, index.shape).movedim(-1, -3)
    bias = position_bias(table, index)
    assert torch.equal(bias, plain)
    assert bias.is_contiguous()
    weight = torch.randn_like(plain)
    expected, found = (torch.autograd.grad((b * weight).sum(), table)[0] for b in (plain, bias))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_bf16_bias_is_summed_in_fp32() -> None:
    """Rounded once: an error of 2^-9 at most. A sum in bf16 is off by several percent."""
    index = relative_position_index(16)
    table = torch.zeros(31**2, 4, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(4, 256, 256, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(position_bias(table, index), table, grad)
    exact = torch.zeros(31**2, 4, dtype=torch.float64)
    exact.index_add_(0, index.view(-1), grad.double().flatten(1).T)
    error = (found.double() - exact).norm() / exact.norm()
    assert error < 0.0024


def test_the_gradient_of_a_bias_is_summed_in_a_fixed_order() -> None:
    """A scatter would be compiled to atomic additions in the table's dtype."""
    index = relative_position_index(4)

    def gradient(table: Tensor, grad: Tensor) -> Tensor:
        return torch.autograd.grad(position_bias(table, index), table, grad)[0]

    table = torch.zeros(49, 2, dtype=torch.bfloat16, requires_grad=True)
    graph = make_fx(gradient)(table, torch.ones(2, 16, 16, dtype=torch.bfloat16)).graph
    operations = [node for node in graph.nodes if node.op == "call_function"]
    names = {node.target.overloadpacket.__name__ for node in operations}
    assert not {name for name in names if "index_" in name or "scatter" in name} - {"index_select"}
    sums = [node for node in operations if node.target.overloadpacket.__name__ == "sum"]
    assert [node.kwargs["dtype"] for node in sums] == [torch.float32] * 2
