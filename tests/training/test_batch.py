"""The randomness of a batch depends only on seed, step and stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffit_train.diffusion.objective import load_objective
from diffit_train.training.batch import BatchBuilder
from tests.conftest import tiny_recipe
from tests.made import make_manifest


def _builder(root: Path, *overrides: str) -> BatchBuilder:
    recipe = tiny_recipe(root, *overrides)
    manifest = make_manifest([], frames=2)
    return BatchBuilder(recipe, manifest, load_objective(recipe.diffusion), torch.device("cpu"))


def test_draws_depend_on_seed_step_and_stream_alone(tmp_path: Path) -> None:
    first, again = (_builder(tmp_path, "train.seed=1").draw(2, 3, 4) for _ in range(2))
    for mine, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    others = [_builder(tmp_path, "train.seed=2").draw(2, 3, 4)]
    others += [_builder(tmp_path, "train.seed=1").draw(*key, 4) for key in ((3, 3), (2, 4))]
    for other in others:
        assert (other.noise != first.noise).all()
    assert (first.noise != first.posterior).all()


def test_draws_have_the_right_distributions(tmp_path: Path) -> None:
    builder = _builder(tmp_path, "train.label_dropout=0.1")
    parts = zip(*[builder.draw(step, 0, 50) for step in range(200)], strict=True)
    t, noise, _, flip, drop = (np.concatenate(part) for part in parts)
    steps = int(t.max()) + 1
    assert t.min() == 0
    assert t.mean() == pytest.approx((steps - 1) / 2, abs=5 * 0.3 * steps / 100)
    assert noise.mean() == pytest.approx(0, abs=5 / 200)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert drop.mean() == pytest.approx(0.1, abs=5 * 0.3 / 100)
    assert flip.mean() == pytest.approx(0.5, abs=5 * 0.5 / 100)
