"""A step of the ImageNet recipes, counted, against what `diffit plan` estimates."""

from __future__ import annotations

from typing import Any

import pytest

from tests.rehearsal.attention_rules import Attention, kernel_on_sm90
from tests.rehearsal.run import needs_stand_in, rehearse

pytestmark = needs_stand_in
RECIPES = ("imagenet256", "imagenet512")


@pytest.fixture(scope="module")
def counted() -> Any:
    """By recipe."""
    return rehearse("budgets")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_agrees_with_what_is_counted(recipe: str, counted: Any) -> None:
    found, planned = counted[recipe], counted[recipe]["planned"]
    assert planned["kept"] == pytest.approx(found["kept"], rel=0.1)
    assert planned["kernels"] == pytest.approx(found["kernels"], rel=0.1)
    assert planned["bytes"] == pytest.approx(found["bytes_of_others"], rel=0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_attention_is_fused(recipe: str, counted: Any) -> None:
    (key,) = counted[recipe]["attention"]
    given = Attention.parse(key)
    assert given.dtype == "BFloat16"
    assert kernel_on_sm90(given) == "efficient"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_fits_a_card_of_80_gb(recipe: str, counted: Any) -> None:
    """With the states of eight ranks, and a quarter left for what is not counted."""
    found = counted[recipe]
    states = 3 * 2**30
    assert found["kept"] + found["largest"] + states < 0.75 * 80e9


@pytest.mark.parametrize("recipe", RECIPES)
def test_kernels_of_a_step(recipe: str, counted: Any) -> None:
    """51 of a block: the math kernel of attention alone would be 25 more."""
    assert counted[recipe]["kernels"] < 1500
