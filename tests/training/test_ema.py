"""EMA against its formulas, and EMAs reconstructed from snapshots."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from diffit_train.config.train import EmaProfile, Train
from diffit_train.runs.checkpoints import Slice
from diffit_train.runs.phema import WIDEST_PROFILE, Profile, power_exponent, reconstruct
from diffit_train.training.ema import ema_decay
from diffit_train.training.engine import Engine
from tests.training.ranks import on_ranks
from tests.training.test_engine import BATCH, CPU, _model, _one_step

PROFILES = {
    "constant": EmaProfile(decay=0.9),
    "ramped": EmaProfile(half_life_images=20.0, ramp_ratio=0.05),
    "power": EmaProfile(sigma_rel=0.1),
}


@given(sigma_rel=st.floats(0.01, 0.28))
def test_a_power_profile_has_its_nominal_width(sigma_rel: float) -> None:
    gamma = power_exponent(sigma_rel)
    t = (np.arange(200_000) + 0.5) / 200_000
    density = (gamma + 1) * t**gamma
    mean = (density * t).mean()
    assert math.sqrt((density * (t - mean) ** 2).mean()) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, math.nan])
def test_impossible_profile_widths_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="must be between"):
        power_exponent(sigma_rel)


def _averaged(profile: EmaProfile, weights: np.ndarray) -> float:
    """Apply the update rule, starting from an EMA that is far off."""
    average = 1000.0
    for step, value in enumerate(weights):
        decay = ema_decay(profile, step, batch_size=8)
        average = decay * average + (1 - decay) * value
    return average


def test_updates_sum_to_the_profile() -> None:
    weights = np.random.default_rng(0).normal(size=300)
    for sigma_rel in (0.05, 0.2):
        profile = Profile(300, power_exponent(sigma_rel)).weights(1, 300)
        assert profile.sum() == pytest.approx(1.0)
        by_rule = _averaged(EmaProfile(sigma_rel=sigma_rel), weights)
        assert by_rule == pytest.approx(profile @ weights, rel=1e-9)


def test_half_life_is_counted_in_images() -> None:
    steady = EmaProfile(half_life_images=80.0)
    # Ten steps of eight images.
    assert ema_decay(steady, 0, 8) ** 10 == pytest.approx(0.5)
    ramped = EmaProfile(half_life_images=80.0, ramp_ratio=0.05)
    assert ema_decay(ramped, 0, 8) == 0.0
    assert ema_decay(ramped, 100, 8) == pytest.approx(0.5 ** (8 / 40))
    assert ema_decay(ramped, 10_000, 8) == ema_decay(steady, 0, 8)


@pytest.mark.parametrize("wanted", [0.06, 0.1, 0.14])
def test_a_reconstructed_ema_matches_training(wanted: float) -> None:
    steps = np.arange(40, 1001, 40)
    # Weights that drift and jitter, as in training.
    weights = np.cumsum(np.random.default_rng(1).normal(size=1000)) / 10
    weights += np.random.default_rng(2).normal(size=1000)
    sources = [(int(s), sigma) for s in steps for sigma in (0.05, 0.15)]
    snapshots = [Profile(s, power_exponent(sigma)) for s, sigma in sources]
    values = [_averaged(EmaProfile(sigma_rel=sigma), weights[:s]) for s, sigma in sources]
    solution = reconstruct(snapshots, Profile(1000, power_exponent(wanted)))
    assert solution.error < 0.05
    made = float(solution.coefficients @ values)
    truth = _averaged(EmaProfile(sigma_rel=wanted), weights)
    assert made == pytest.approx(truth, abs=0.02 * float(np.std(weights)))


def test_a_snapshot_with_the_wanted_profile_is_reproduced() -> None:
    snapshots = [Profile(s, power_exponent(w)) for s in (50, 100) for w in (0.05, 0.1)]
    solution = reconstruct(snapshots, Profile(100, power_exponent(0.1)))
    np.testing.assert_allclose(solution.coefficients, [0, 0, 0, 1], atol=1e-9)
    assert solution.error < 1e-9
    with pytest.raises(ValueError, match="no snapshots"):
        reconstruct([], Profile(100, 3.0))
    assert power_exponent(WIDEST_PROFILE * 0.9999) < 0.01


def _dense_profile(steps: int, sigma_rel: float, length: int) -> np.ndarray:
    """Contribution of each of `length` training steps to an EMA, update by update."""
    t = 1.0 / sigma_rel**2
    # The largest root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    gamma = np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max()
    profile = np.zeros(length)
    for step in range(1, steps + 1):
        kept = (1.0 - 1.0 / step) ** (gamma + 1.0)
        profile *= kept
        profile[step - 1] = 1.0 - kept
    return profile


@pytest.mark.parametrize("count", [4, 8, 32])
@pytest.mark.parametrize("wanted", [0.03, 0.05, 0.07, 0.1, 0.15, 0.25])
@pytest.mark.parametrize("at", [1.0, 0.7])
def test_coefficients_are_normalized_least_squares(count: int, wanted: float, at: float) -> None:
    length, last = 640, round(640 * at)
    steps = np.arange(1, count // 2 + 1) * length // (count // 2)
    sources = [(int(s), sigma) for s in steps for sigma in (0.05, 0.1)]
    matrix = np.stack([_dense_profile(s, sigma, length) for s, sigma in sources], axis=1)
    target = _dense_profile(last, wanted, length)
    free = np.linalg.lstsq(matrix, target, rcond=None)[0]
    expected = free / free.sum()
    found = reconstruct(
        [Profile(s, power_exponent(sigma)) for s, sigma in sources],
        Profile(last, power_exponent(wanted)),
    )
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-6, atol=1e-9)
    assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-12)
    away = np.linalg.norm(matrix @ expected - target) / np.linalg.norm(target)
    assert found.error == pytest.approx(away, rel=1e-6, abs=1e-9)


def test_coefficients_approach_the_continuous_limit() -> None:
    """EDM2's algorithm 3: inner products of power functions, in closed form."""
    steps = np.array([2500.0, 5000.0, 7500.0, 10_000.0])
    ends = np.concatenate([np.repeat(steps, 2), [10_000.0]])
    gammas = np.array([power_exponent(s) for s in [0.05, 0.1] * 4 + [0.07]])

    def product(i: int, j: int) -> float:
        # The integral of the product of two (g + 1) t^g / T^(g + 1), up to the earlier end.
        early = min(ends[i], ends[j])
        power = gammas[i] + gammas[j] + 1.0
        scale = (gammas[i] + 1.0) * (gammas[j] + 1.0) / power
        logarithm = power * math.log(early)
        logarithm -= (gammas[i] + 1.0) * math.log(ends[i]) + (gammas[j] + 1.0) * math.log(ends[j])
        return scale * math.exp(logarithm)

    table = np.array([[product(i, j) for j in range(9)] for i in range(9)])
    expected = np.linalg.solve(table[:8, :8], table[:8, 8])
    expected /= expected.sum()
    snapshots = [Profile(int(s), g) for s, g in zip(ends[:8], gammas[:8], strict=True)]
    found = reconstruct(snapshots, Profile(10_000, gammas[8]))
    np.testing.assert_allclose(found.coefficients, expected, atol=2e-3)


def _gathered(engine: Engine, kind: str) -> dict[str, torch.Tensor]:
    """A full state, assembled from what each rank owns."""
    mine = [(s.slice, s.values[kind].clone()) for s in engine.owned()]
    everyone: list[Any] = [None] * engine.world_size
    dist.all_gather_object(everyone, mine)
    whole = {name: torch.full((shape.numel(),), torch.nan) for name, shape in engine.shapes.items()}
    for part in everyone:
        for slice_, values in part:
            assert isinstance(slice_, Slice)
            whole[slice_.name][slice_.offset : slice_.offset + slice_.length] = values
    assert not any(values.isnan().any() for values in whole.values())
    return whole


def _compare_with_whole(rank: int, world: int, stage: int, precision: str) -> None:
    train = Train(
        steps=9, batch_size=BATCH, lr=1e-2, zero_stage=stage, precision=precision, ema=PROFILES
    )
    engine = Engine(_model(), train, rank, world, CPU)
    averages = {name: _gathered(engine, "master") for name in PROFILES}
    total = sum(s.slice.length for s in engine.owned())
    assert total < 0.6 * sum(shape.numel() for shape in engine.shapes.values())
    for step in range(5):
        _one_step(engine, step)
        masters = _gathered(engine, "master")
        for name, profile in PROFILES.items():
            for key, average in averages[name].items():
                average.lerp_(masters[key], 1.0 - ema_decay(profile, step, BATCH))
    for name in PROFILES:
        mine = _gathered(engine, name)
        assert all(torch.equal(mine[key], value) for key, value in averages[name].items()), name
        assert any(not torch.equal(mine[key], masters[key]) for key in mine)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_sharded_ema_equals_ema_of_gathered_weights(stage: int, precision: str) -> None:
    on_ranks(2, _compare_with_whole, stage, precision)
