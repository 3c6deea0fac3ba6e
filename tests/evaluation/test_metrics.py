"""Metrics against scipy, closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from diffit_train.evaluation.metrics import Moments, frechet_distance, precision_recall


def _rows(seed: int, count: int, width: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + seed


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(1, 8), st.integers(1, 59))
def test_moments_of_parts_add_up(count: int, width: int, cut: int) -> None:
    rows = _rows(0, count, width)
    cut = min(cut, count)
    moments = Moments.of(rows[:cut]) + Moments.of(rows[cut:])
    np.testing.assert_allclose(moments.mean, rows.mean(0), atol=1e-10)
    covariance = np.cov(rows, rowvar=False).reshape(width, width)
    np.testing.assert_allclose(moments.covariance, covariance, atol=1e-9)


@pytest.mark.parametrize("count", [200, 20])
def test_frechet_distance_agrees_with_scipy(count: int) -> None:
    """Also with fewer rows than columns, where the covariances are singular."""
    a, b = Moments.of(_rows(1, count, 32)), Moments.of(_rows(2, 300, 32))
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    difference = a.mean - b.mean
    expected = difference @ difference + np.trace(a.covariance + b.covariance - 2 * root)
    mine = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert mine == pytest.approx(expected, rel=1e-5)
    other_way = frechet_distance(b.mean, b.covariance, a.mean, a.covariance)
    assert mine == pytest.approx(other_way, rel=1e-8)


def test_frechet_distance_of_diagonal_covariances() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.0])
    expected = 3 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    mine = frechet_distance(np.zeros(3), np.diag(a), np.full(3, 0.5), np.diag(b))
    assert mine == pytest.approx(expected)
    assert frechet_distance(np.zeros(3), np.diag(a), np.zeros(3), np.diag(a)) == pytest.approx(0)


def test_impossible_moments_are_named() -> None:
    good = np.eye(2)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.array([np.nan, 0]), good, np.zeros(2), good)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(np.zeros(2), -good, np.zeros(2), good)


def _brute_force(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    radii = [sorted(np.linalg.norm(m - other) for other in manifold)[k] for m in manifold]
    inside = [
        any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True))
        for p in points
    ]
    return float(np.mean(inside))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_brute_force(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffit_train.evaluation.metrics._BLOCK_ROWS", 7)
    random = np.random.default_rng(0)
    real, fake = random.normal(size=(40, 3)), random.normal(0.8, 0.6, size=(30, 3))
    precision, recall = precision_recall(real, fake, k)
    assert precision == pytest.approx(_brute_force(fake, real, k))
    assert recall == pytest.approx(_brute_force(real, fake, k))
    assert precision != recall


def test_precision_and_recall_at_their_ends() -> None:
    random = np.random.default_rng(0)
    real = random.normal(size=(50, 4))
    assert precision_recall(real, real, 3) == (1.0, 1.0)
    assert precision_recall(real, real + 100, 3) == (0.0, 0.0)
    with pytest.raises(ValueError, match="3 fake pictures are too few for 3 neighbours"):
        precision_recall(real, real[:3], 3)
