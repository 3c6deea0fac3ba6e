"""A fleet of evaluation jobs that loses an actor and a whole job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import tiny_recipe
from tests.faults.fleet import disturbed, pooled


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_fleet_with_faults_gives_the_same_metrics(trained: Path, tmp_path: Path) -> None:
    changes = ("evaluate.samples=400", "evaluate.sampler.steps=20")
    texts = ["guidance.scale=1,2,3,4", "seed=0,1"]
    outcome = disturbed(lambda root: tiny_recipe(root, *changes), trained, "tiny", texts, tmp_path)
    assert len(outcome.killed) == 2
    assert len(outcome.alone) == 8
    assert outcome.fleet == outcome.alone


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_as_one_job_gives_the_same_metrics(trained: Path, tmp_path: Path) -> None:
    changes = ("evaluate.samples=100", "evaluate.sampler.steps=20")
    outcome = pooled(
        lambda root: tiny_recipe(root, *changes),
        trained,
        "tiny",
        ["guidance.scale=1,2,3"],
        tmp_path,
    )
    assert len(outcome.alone) == 3
    assert outcome.fleet == outcome.alone
