"""A compiled block of the 561M model for sm_90: launches, spills, atomic additions."""

from __future__ import annotations

import importlib.util

import pytest

from tests.rehearsal.run import needs_stand_in, rehearse

pytestmark = [
    needs_stand_in,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="triton is not installed: pip install '.[rehearsal]'",
    ),
]


@pytest.mark.parametrize("tokens", [256, 1024])
def test_a_compiled_block(tokens: int) -> None:
    passes = rehearse("lowering", str(tokens))
    assert passes.keys() == {"forward", "backward"}
    for each in passes.values():
        assert each["atomic"] == []
        assert each["kernels"]
        assert [kernel for kernel in each["kernels"] if kernel["spilled"]] == []
    launches = sum(each["triton"] + each["library"] for each in passes.values())
    # 51 of an eager block.
    assert launches <= 45
