"""EMAs reconstructed from snapshots: profiles, coefficients, and the weights they make."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffit_train.config.train import EmaProfile
from diffit_train.runs.phema import WIDEST_PROFILE, Profile, power_exponent, reconstruct
from diffit_train.training.ema import ema_decay


@settings(deadline=None)
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
