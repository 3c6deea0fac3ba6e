"""The Trainer on CUDA devices: what it learns, in which arithmetic, what the host waits for."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from tests.rehearsal.attention_rules import Attention, kernel_on_sm90
from tests.rehearsal.run import needs_stand_in, rehearse
from tests.rehearsal.training import CASES, FIRST, LAST, RANKS

pytestmark = needs_stand_in
# Relative differences of losses in nine steps, from those in fp32 on a CPU.
LIMITS = {"Float": 1e-5, "BFloat16": 5e-3}
# DeepSpeed's copy of the gradient norm to the device, by which it decides on a step.
DEEPSPEED_COPY = "to_device:blocking:4"
# With offload, DeepSpeed's optimizer is on the host and waits for gradients.
WAITING = [name for name in CASES if "offload" in name]
# Each differs from one of the others in one way that others show.
SLOW = [
    "latent stage 1, autocast",
    "latent stage 1, bf16",
    "latent stage 2, bf16",
    "latent stage 2, bf16, selective",
    "latent stage 2, bf16, deterministic",
    "latent stage 2, bf16, offload",
    "latent stage 3, autocast",
    "flow fp32",
    "pixels fp32",
    "pixels stage 2",
    "pixels stage 3",
]
ALL = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
IN_ORDER = [case for case in ALL if case.values[0] not in WAITING]


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses by the first word of a case's name."""
    names = [name for name in CASES if name.endswith(" fp32")]
    results = rehearse("training", "cpu", "1", str(tmp_path_factory.mktemp("cpu")), *names)
    return {name.split()[0]: result["losses"] for name, result in results.items()}


@pytest.fixture(scope="module")
def on_cuda(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """The selected cases on one device: they share a process, whose start takes long."""
    mine = [i for i in request.session.items if isinstance(i, pytest.Function)]
    selected = {
        item.callspec.params["name"]
        for item in mine
        if item.module is request.module and "on_cuda" in item.fixturenames
    }
    names = [name for name in CASES if name in selected]
    return rehearse("training", "cuda", "1", str(tmp_path_factory.mktemp("cuda")), *names)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Cases on two devices."""
    return rehearse("training", "cuda", "2", str(tmp_path_factory.mktemp("ranks")), *RANKS)


def _dtype(name: str) -> str:
    """Of the matrix products of a case; the recipe `cifar10` trains under autocast."""
    full = "fp32" in name or "tf32" in name
    return "Float" if full else "BFloat16"


def _check_losses(name: str, result: Any, expected: list[float]) -> None:
    assert "error" not in result, result["error"]
    assert result["reached"] == [FIRST, LAST]
    assert all(math.isfinite(norm) and norm > 0 for norm in result["grad_norms"])
    assert result["losses"] == pytest.approx(expected, rel=LIMITS[_dtype(name)])


@pytest.mark.parametrize("name", ALL)
def test_it_trains_resumes_and_learns_as_on_a_cpu(name: str, on_cuda: Any, on_a_cpu: Any) -> None:
    _check_losses(name, on_cuda[name], on_a_cpu[name.split()[0]])


@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_learn_the_same(name: str, on_two_ranks: Any, on_a_cpu: Any) -> None:
    _check_losses(name, on_two_ranks[name], on_a_cpu[name.split()[0]])


@pytest.mark.parametrize("name", ALL)
def test_matrix_products_have_the_dtype_of_the_precision(name: str, on_cuda: Any) -> None:
    products = {
        tuple(key.split(":")[1:]) for key in on_cuda[name]["counters"] if key.startswith("product:")
    }
    # Inputs are embedded in fp32, and augmentation resamples in fp32 at places in fp64.
    rest = {("convolution", "Float"), ("convolution_backward", "Float")}
    rest |= {("bmm", "Double")} if name.startswith("pixels") else set()
    assert {dtype for _, dtype in products - rest} == {_dtype(name)}


@pytest.mark.parametrize("name", IN_ORDER)
def test_a_step_reads_the_device_once_and_never_waits_for_a_copy(name: str, on_cuda: Any) -> None:
    counted = on_cuda[name]["counters"]
    reads = {key: n for key, n in counted.items() if key.startswith(("read", "to_host"))}
    assert sum(reads.values()) == 1, reads
    copies = {key: n for key, n in counted.items() if key.startswith("to_device:blocking")}
    assert copies.pop(DEEPSPEED_COPY, 0) <= 1
    assert not copies


@pytest.mark.parametrize("name", ALL)
def test_torch_is_left_as_it_was(name: str, on_cuda: Any) -> None:
    """ZeRO 3 replaces `torch.nn.functional.linear`, with which other models would go on."""
    assert on_cuda[name]["linear_restored"]


@pytest.mark.parametrize("name", ALL)
def test_attention_is_fused(name: str, on_cuda: Any) -> None:
    counted = on_cuda[name]["counters"]
    found = [Attention.parse(key) for key in counted if key.startswith("attention")]
    # Tokens of these small models are not aligned as the recipes' are.
    assert {kernel_on_sm90(each.aligned()) for each in found} <= {"efficient"}
    assert "product:_scaled_dot_product_efficient_attention:" + _dtype(name) in counted


@pytest.mark.parametrize(
    ("name", "collective", "dtype"),
    [
        ("latent fp32", "allreduce_", "Float"),
        ("latent stage 2, bf16, micro-batches", "allreduce_", "BFloat16"),
        ("latent stage 2, bf16, overlap", "allreduce_", "BFloat16"),
        # Not in bf16, as DeepSpeed's own autocast would.
        ("latent stage 2, autocast", "allreduce_", "Float"),
        ("latent stage 3, bf16", "_reduce_scatter_base_", "BFloat16"),
    ],
)
def test_gradients_are_exchanged_in_their_dtype(
    name: str, collective: str, dtype: str, on_two_ranks: Any
) -> None:
    counted = on_two_ranks[name]["counters"]
    keys = [re.fullmatch(r"collective:(\w+):(\w+):(\d+)", key) for key in counted]
    sizes: dict[tuple[str, str], int] = {}
    for key in keys:
        if key and int(key[3]) > 64:  # not flags and norms
            sizes.setdefault((key[1], key[2]), 0)
            sizes[key[1], key[2]] += int(key[3]) * counted[key[0]]
    gradients = {k: v for k, v in sizes.items() if k[0] in ("allreduce_", "_reduce_scatter_base_")}
    assert gradients.keys() == {(collective, dtype)}
    parameters = 42_532
    passes = {"latent stage 2, bf16, micro-batches": 2, "latent stage 3, bf16": 2}.get(name, 1)
    width = 4 if dtype == "Float" else 2
    assert gradients[collective, dtype] == pytest.approx(passes * parameters * width, rel=0.02)


def test_overlap_exchanges_gradients_in_several_buckets(on_two_ranks: Any) -> None:
    def buckets(name: str) -> int:
        counted = on_two_ranks[name]["counters"]
        return sum(n for key, n in counted.items() if key.startswith("collective:allreduce_:BF"))

    assert buckets("latent stage 2, bf16, overlap") > 5
