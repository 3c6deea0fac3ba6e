"""Every attention kernel against the reference in float64, with gradients; windows."""

from __future__ import annotations

import pytest
import torch

from diffit_train.errors import UserError
from diffit_train.models import attention_kernels
from diffit_train.models.attention import TMSA, relative_position_index
from diffit_train.models.attention_kernels import (
    KERNELS,
    Kernel,
    enable_determinism,
    kernel_name,
    reference_attention,
)

SIDE, HEADS, SIZE = 4, 3, 8


def _inputs(batch: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = SIDE**2
    # As TMSA passes them: slices of one projection.
    qkv = torch.randn(batch, count, 3, HEADS, SIZE, generator=generator, dtype=torch.float64)
    table = torch.randn((2 * SIDE - 1) ** 2, HEADS, generator=generator, dtype=torch.float64)
    parts = [*qkv.permute(2, 0, 3, 1, 4), table]
    return [part.detach().to(device, dtype).requires_grad_() for part in parts]


def _results(kernel: Kernel, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    q, k, v, table = inputs
    out = kernel(q, k, v, table, relative_position_index(SIDE).to(q.device))
    target = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    (out.double() * target.view(out.shape)).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def _assert_like_reference(name: str, dtype: torch.dtype, tolerance: float, device: str) -> None:
    expected = _results(reference_attention, _inputs(5, torch.float64))
    found = _results(KERNELS[name], _inputs(5, dtype, device))
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double().cpu(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["reference", "sdpa", "chunked"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.1)]
)
def test_kernels_match_the_reference_and_its_gradients(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small that a chunk is two images (the last one: one), or two heads of one image.
    for weights in (2 * HEADS * SIDE**4, 2 * SIDE**4):
        monkeypatch.setattr(attention_kernels, "CHUNK_WEIGHTS", weights)
        _assert_like_reference(name, dtype, tolerance, "cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_matches_the_reference() -> None:
    # torch has no backward pass for it on a CPU; the next test checks its gradients.
    inputs = [tensor.detach() for tensor in _inputs(5, torch.float32)]
    index = relative_position_index(SIDE)
    out, exact = (KERNELS[name](*inputs, index) for name in ("flex", "reference"))
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_a_gpu(name: str) -> None:
    _assert_like_reference(name, torch.float32, 2e-3, "cuda")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_without_position(name: str) -> None:
    q, k, v = (tensor.detach() for tensor in _inputs(2, torch.float64)[:3])
    expected = torch.softmax(torch.einsum("bhik,bhjk->bhij", q, k) / SIZE**0.5, -1)
    out = KERNELS[name](q, k, v, None, None)
    torch.testing.assert_close(out, torch.einsum("bhij,bhjk->bhik", expected, v))


def test_no_attention_weights_are_saved_for_backward() -> None:
    inputs = _inputs(5, torch.float32)
    sizes: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
    )
    with hooks:
        KERNELS["chunked"](*inputs, relative_position_index(SIDE))
    assert max(sizes) < 5 * HEADS * SIDE**4
    with hooks:
        KERNELS["reference"](*inputs, relative_position_index(SIDE))
    assert max(sizes) == 5 * HEADS * SIDE**4


def test_deterministic_mode_refuses_atomics_and_is_on_afterwards() -> None:
    with pytest.raises(UserError, match=r"train\.deterministic.*'flex'.*model\.attention=sdpa"):
        enable_determinism("flex")
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        enable_determinism("sdpa")
        assert torch.are_deterministic_algorithms_enabled()
        grads = [_results(KERNELS["sdpa"], _inputs(5, torch.float32))[-1] for _ in range(2)]
        assert torch.equal(*grads)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_device_determines_the_kernel() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kernel_name("auto", cpu) == "chunked"
    assert kernel_name("auto", cuda) == "sdpa"
    assert kernel_name("flex", cuda) == "flex"
    assert kernel_name("reference", cuda) == "reference"
    with pytest.raises(UserError, match=r"flex.*CUDA.*model\.attention=auto"):
        kernel_name("flex", cpu)


@pytest.mark.parametrize("name", KERNELS)
def test_tokens_attend_to_their_own_window(name: str) -> None:
    torch.manual_seed(0)
    side, window = 6, 3
    whole = TMSA(HEADS * SIZE, HEADS, side, window=window, condition_size=5).double()
    whole.kernel = KERNELS[name]
    single = TMSA(HEADS * SIZE, HEADS, window, condition_size=5).double()
    single.load_state_dict(whole.state_dict())
    x, c = torch.randn(2, side, side, HEADS * SIZE).double(), torch.randn(2, 5).double()
    with torch.no_grad():
        out = whole(x.view(2, side**2, -1), c).view(2, side, side, -1)
    for row in range(0, side, window):
        for column in range(0, side, window):
            window_index = (slice(None), slice(row, row + window), slice(column, column + window))
            expected = single(x[window_index].reshape(2, window**2, -1), c)
            torch.testing.assert_close(out[window_index].reshape(2, window**2, -1), expected)


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="window 4 .* 6"):
        TMSA(12, 3, 6, window=4)
