"""Metrics against scipy, closed forms and brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, special
from scipy.spatial.distance import cdist

from diffit_train.evaluation import metrics
from diffit_train.evaluation.metrics import (
    FeatureStats,
    InceptionScore,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def _rows(seed: int, count: int, width: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + seed


def _real_looking(seed: int, count: int, width: int = 96, shift: float = 0.0) -> np.ndarray:
    """Features like Inception's: not negative, many zeros, a spectrum of eight decades; float32."""
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    scales = 10.0 ** -np.linspace(0, 4, width)
    latent = np.random.default_rng(seed).normal(size=(count, width)) * scales
    return np.maximum(latent @ mixing * 4 + 0.2 + shift, 0).astype(np.float32)


def _blocks(rows: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(rows, sorted(cut % (len(rows) + 1) for cut in cuts))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(1, 8), st.integers(1, 59))
def test_stats_of_parts_add_up(count: int, width: int, cut: int) -> None:
    rows = _rows(0, count, width)
    cut = min(cut, count)
    moments = FeatureStats.of(rows[:cut]) + FeatureStats.of(rows[cut:])
    np.testing.assert_allclose(moments.mean, rows.mean(0), atol=1e-10)
    covariance = np.cov(rows, rowvar=False).reshape(width, width)
    np.testing.assert_allclose(moments.covariance, covariance, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=6), st.integers(1, 50))
def test_any_blocks_give_the_same_stats(cuts: list[int], block_rows: int) -> None:
    rows = _real_looking(0, 120, 12)
    whole = FeatureStats.of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_ROWS", block_rows)
        parts = [FeatureStats.of(block) for block in _blocks(rows, cuts)]
    total = sum(parts[1:], start=parts[0])
    assert total.count == whole.count == 120
    np.testing.assert_allclose(total.total, whole.total, rtol=1e-12)
    np.testing.assert_allclose(total.outer, whole.outer, rtol=1e-12)


def test_stats_far_from_zero_keep_their_precision() -> None:
    rows = np.random.default_rng(0).normal(size=(5000, 6)) + 300
    expected = np.cov(rows - 300, rowvar=False)
    error = np.abs(FeatureStats.of(rows).covariance - expected).max() / expected.max()
    assert error < 1e-9


def test_impossible_features_are_named() -> None:
    rows = _rows(0, 10, 3)
    with pytest.raises(ValueError, match=r"have shape \(3,\), not \(images, features\)"):
        FeatureStats.of(rows[0])
    for wrong in (np.nan, np.inf):
        rows[4, 1] = wrong
        with pytest.raises(ValueError, match="features: some values are not finite"):
            FeatureStats.of(rows)
    with pytest.raises(ValueError, match="1 images are too few"):
        _ = FeatureStats.of(rows[:1]).covariance
    with pytest.raises(ValueError, match="0 images are too few"):
        _ = FeatureStats.of(rows[:0]).mean


# ---- Frechet distance ----


def _by_sqrtm(a: FeatureStats, b: FeatureStats) -> float:
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    difference = a.mean - b.mean
    return difference @ difference + np.trace(a.covariance + b.covariance - 2 * root)


def _by_singular_values(a: np.ndarray, b: np.ndarray) -> float:
    """Without any covariance: the trace of the root is the nuclear norm of A^T B, centered rows.

    Unlike sqrtm, this is exact even if the covariances are singular.
    """
    mean = a.mean(0) - b.mean(0)
    a, b = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (a, b))
    root = linalg.svdvals(a @ b.T).sum()
    return mean @ mean + (a**2).sum() + (b**2).sum() - 2 * root


@pytest.mark.parametrize("count", [400, 20])
@pytest.mark.parametrize("other_count", [300, 12])
@pytest.mark.parametrize("make", [_rows, _real_looking])
def test_frechet_distance_is_exact(count: int, other_count: int, make: Callable) -> None:
    """Including fewer rows than columns, which makes one or both covariances singular."""
    rows_a = np.asarray(make(1, count, 64), np.float64)
    rows_b = np.asarray(make(2, other_count, 64), np.float64)
    a, b = FeatureStats.of(rows_a), FeatureStats.of(rows_b)
    mine = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert mine == pytest.approx(_by_singular_values(rows_a, rows_b), rel=1e-7)
    other_way = frechet_distance(b.mean, b.covariance, a.mean, a.covariance)
    assert mine == pytest.approx(other_way, rel=1e-8)
    if min(count, other_count) > 64:
        assert mine == pytest.approx(_by_sqrtm(a, b), rel=1e-6)
    assert mine > 0


def test_frechet_distance_of_a_covariance_rounded_to_float32() -> None:
    """Like some published statistics, which are slightly indefinite."""
    a, b = FeatureStats.of(_rows(1, 60, 64)), FeatureStats.of(_rows(2, 300, 64))
    rounded = a.covariance.astype(np.float32).astype(np.float64)
    values = np.linalg.eigvalsh(rounded)
    assert values.min() < -1e-9 * values.max()
    exact = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    mine = frechet_distance(a.mean, rounded, b.mean, b.covariance)
    assert mine == pytest.approx(exact, rel=1e-3)


def test_frechet_distance_of_constant_features() -> None:
    """All images of a collapsed model have the same features."""
    none, some = np.zeros((5, 5)), FeatureStats.of(_rows(1, 50, 5)).covariance
    mean = np.full(5, 2.0)
    assert frechet_distance(mean, none, mean, none) == 0
    expected = 20 + np.trace(some)
    assert frechet_distance(mean, none, np.zeros(5), some) == pytest.approx(expected)
    assert frechet_distance(np.zeros(5), some, mean, none) == pytest.approx(expected)


def test_frechet_distance_of_diagonal_covariances() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.0])
    expected = 3 * 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    mine = frechet_distance(np.zeros(3), np.diag(a), np.full(3, 0.5), np.diag(b))
    assert mine == pytest.approx(expected)
    assert frechet_distance(np.zeros(3), np.diag(a), np.zeros(3), np.diag(a)) == pytest.approx(0)


def test_impossible_stats_are_named() -> None:
    good, zero = np.eye(2), np.zeros(2)
    with pytest.raises(ValueError, match="a mean: some values are not finite"):
        frechet_distance(np.array([np.nan, 0]), good, zero, good)
    with pytest.raises(ValueError, match="a covariance: some values are not finite"):
        frechet_distance(zero, good, zero, np.diag([1, np.inf]))
    turned = np.array([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues -1 and 3
    for bad, value in ((-good, "-1; the largest is -1"), (turned, "-1; the largest is 3")):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match=f"has a negative eigenvalue, {value}"):
                frechet_distance(zero, pair[0], zero, pair[1])
    skewed = np.array([[1.0, 0.9], [0.0, 1.0]])
    other = np.array([[1.0, 0.5], [0.5, 1.0]])
    with pytest.raises(ValueError, match=r"product add up to 2, but its trace is 2\.45"):
        frechet_distance(zero, skewed, zero, other)
    with pytest.raises(ValueError, match="differ in shape"):
        frechet_distance(zero, good, np.zeros(3), np.eye(3))


# ---- Inception score ----


def _logits(seed: int, count: int, classes: int, spread: float = 3.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=(count, classes)) * spread).astype(np.float32)


def _score_by_formula(logits: np.ndarray, split: int) -> tuple[float, float]:
    p = special.softmax(logits.astype(np.float64), axis=1)
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        divergence = special.rel_entr(part, part.mean(0)).sum(1)
        scores.append(np.exp(divergence.mean()))
    return np.mean(scores), np.std(scores)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 10**6), max_size=6),
    st.integers(1, 90),
    st.integers(1, 40),
    st.sampled_from([0.1, 3.0, 60.0]),
)
def test_inception_score_by_its_formula_from_any_blocks(
    cuts: list[int], split: int, block_rows: int, spread: float
) -> None:
    logits = _logits(0, 80, 7, spread)
    one = InceptionScore(split)
    merged, first = InceptionScore(split), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_ROWS", block_rows)
        for block in _blocks(logits, cuts):
            one.add(block)
            part = InceptionScore(split, first)
            part.add(block)
            merged, first = part + merged, first + len(block)
    expected = _score_by_formula(logits, split)
    assert one.value() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert merged.value() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_inception_score_at_its_extremes() -> None:
    sure = InceptionScore(split=100)
    sure.add(np.tile(np.eye(10) * 1e5, (10, 1)))
    assert sure.value() == (pytest.approx(10), 0)
    # Logits beyond the range of exp: every image is certain of its largest.
    wild = _logits(0, 50, 7, 1e6)
    found = InceptionScore(split=50)
    found.add(wild)
    shares = np.bincount(wild.argmax(1), minlength=7) / 50
    assert found.value() == (pytest.approx(np.exp(special.entr(shares).sum())), 0)
    unsure = InceptionScore()
    unsure.add(np.zeros((20, 10)))
    assert unsure.value() == (pytest.approx(1), 0)


def test_impossible_scores_are_named() -> None:
    with pytest.raises(ValueError, match="inception score has no images"):
        InceptionScore().value()
    score = InceptionScore(4)
    with pytest.raises(ValueError, match="logits: some values are not finite"):
        score.add(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match=r"have shape \(7,\), not"):
        score.add(np.zeros(7))
    score.add(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="logits have 4 classes, but earlier ones had 3"):
        score.add(np.zeros((1, 4)))
    later = InceptionScore(4, first=6)
    later.add(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="split 0 of the inception score has 2 images, not 4"):
        (score + later).value()
    with pytest.raises(ValueError, match="split 0 of the inception score has 4 images, not 2"):
        (score + score).value()
    with pytest.raises(ValueError, match="cannot add scores with splits of 4 and 5"):
        score + InceptionScore(5)


# ---- Kernel distance ----


def _kernel_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    inside = [
        np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
        for s in (x, y)
    ]
    return sum(inside) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_matches_loops() -> None:
    real, fake = _rows(0, 9, 4) / 5, _rows(1, 9, 4) / 5
    # A subset of all rows is the whole set in another order.
    mean, deviation = kernel_distance(real, fake, subsets=3)
    assert mean == pytest.approx(_kernel_by_loops(real, fake), rel=1e-10)
    assert deviation == pytest.approx(0, abs=1e-10)


def test_kernel_distance_is_unbiased_and_repeatable() -> None:
    real, same = _real_looking(1, 400), _real_looking(2, 300)
    moved = _real_looking(3, 300, shift=0.5)
    none, deviation = kernel_distance(real, same, subsets=60, size=50)
    assert abs(none) < deviation
    assert deviation > 0
    far, _ = kernel_distance(real, moved, subsets=20, size=50)
    assert far > 10 * deviation
    assert kernel_distance(real, moved, 20, 50) == kernel_distance(real, moved, 20, 50)
    assert kernel_distance(real, moved, 20, 50) != kernel_distance(real, moved, 20, 50, seed=1)
    with pytest.raises(ValueError, match="1 fake images are too few for a kernel distance"):
        kernel_distance(real, moved[:1])
    with pytest.raises(ValueError, match="fake features: some values are not finite"):
        kernel_distance(real, moved * np.nan)
    with pytest.raises(ValueError, match=r"features differ in shape: \(400, 96\), \(300, 95\)"):
        kernel_distance(real, moved[:, 1:])


# ---- Precision and recall ----


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


def test_precision_and_recall_at_their_extremes() -> None:
    random = np.random.default_rng(0)
    real = random.normal(size=(50, 4))
    assert precision_recall(real, real, 3) == (1.0, 1.0)
    assert precision_recall(real, real + 100, 3) == (0.0, 0.0)
    with pytest.raises(ValueError, match="3 fake images are too few for 3 neighbors"):
        precision_recall(real, real[:3], 3)
    with pytest.raises(ValueError, match="real features: some values are not finite"):
        precision_recall(np.full((5, 4), np.inf), real, 3)


def _by_cdist(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def covered(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = np.partition(cdist(manifold, manifold), k, axis=1)[:, k]
        return float((cdist(points, manifold) <= radii).any(1).mean())

    real, fake = real.astype(np.float64), fake.astype(np.float64)
    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("block_rows", [64, 100, 2048])
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1e-20, 0), (1e15, 0), (1, 300)])
def test_precision_and_recall_agree_with_scipy(
    scale: float, offset: float, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On features like Inception's, at any scale and far from zero, exactly."""
    monkeypatch.setattr(metrics, "_BLOCK_ROWS", block_rows)
    real = _real_looking(1, 420).astype(np.float64) * scale + offset
    fake = _real_looking(2, 350, shift=-0.1).astype(np.float64) * scale + offset
    mine = precision_recall(real, fake, 3)
    assert mine == _by_cdist(real, fake, 3)
    assert 0.2 < min(mine) < max(mine) < 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 9), st.integers(1, 30))
def test_precision_and_recall_among_ties(seed: int, k: int, levels: int, block_rows: int) -> None:
    """Integers: many equal distances and rows, and all sums are exact."""
    random = np.random.default_rng(seed)
    real = random.integers(0, levels, size=(30, 3)).astype(np.float64)
    fake = random.integers(0, levels, size=(25, 3)).astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_ROWS", block_rows)
        assert precision_recall(real, fake, k) == _by_cdist(real, fake, k)


def test_clusters_far_apart_keep_their_distances() -> None:
    """In float32 the distances within a cluster would be lost."""
    random = np.random.default_rng(0)
    centers = np.repeat([[0.0], [1e4]], 60, axis=0)
    real, fake = (random.normal(size=(120, 8)) + centers for _ in range(2))
    assert precision_recall(real, fake, 3) == _by_cdist(real, fake, 3)
