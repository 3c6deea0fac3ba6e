"""Precision and recall with ADM's rounding, against its algorithm written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from diffit_train.evaluation import half_precision
from diffit_train.evaluation.metrics import precision_recall

Array = np.ndarray


def _adm_distances(u: Array, v: Array) -> Array:
    """One block, value by value in the dtypes of ADM's graph."""

    def in_type(u: Array, v: Array) -> Array:
        zero, two = u.dtype.type(0), u.dtype.type(2)
        out = np.empty((len(u), len(v)), u.dtype)
        for i, x in enumerate(u):
            for j, y in enumerate(v):
                # Sums are rounded once, at the end.
                lengths = [u.dtype.type((z * z).astype(np.float64).sum()) for z in (x, y)]
                product = u.dtype.type(x.astype(np.float64) @ y.astype(np.float64))
                out[i, j] = max(lengths[0] - two * product + lengths[1], zero)
        return out

    with np.errstate(all="ignore"):
        half = in_type(u.astype(np.float16), v.astype(np.float16))
        if np.isfinite(half).all():
            return half.astype(np.float32)
        return in_type(u.astype(np.float32), v.astype(np.float32))


def _adm(real: Array, fake: Array, k: int, block: int) -> tuple[float, float]:
    """ADM's manifold_radii and evaluate_pr."""

    def blocks(u: Array, v: Array) -> Array:
        return np.vstack(
            [
                np.hstack(
                    [
                        _adm_distances(u[i : i + block], v[j : j + block])
                        for j in range(0, len(v), block)
                    ]
                )
                for i in range(0, len(u), block)
            ]
        )

    radii = [np.sort(blocks(rows, rows), axis=1)[:, k] for rows in (real, fake)]
    between = blocks(real, fake)
    precision = (between <= radii[0][:, None]).any(0).mean()
    return float(precision), float((between <= radii[1]).any(1).mean())


def _features(seed: int, count: int, scale: float) -> Array:
    """Features like Inception's: not negative, many near 0."""
    random = np.random.default_rng(seed)
    return (scale * random.exponential(0.4, (count, 24))).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("scale", "block"),
    # Blocks of several rows; at 120 some squared norms exceed float16's 65,504, so that some
    # blocks are computed in float32 and others are not.
    [(1.0, 100), (1.0, 16), (120.0, 100), (120.0, 9)],
)
def test_it_matches_adms_algorithm(
    seed: int, scale: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_precision, "BLOCK_ROWS", block)
    monkeypatch.setattr(half_precision, "_ROWS", 7)
    real, fake = _features(seed, 45, scale), 1.1 * _features(seed + 100, 60, scale)
    fake = fake.astype(np.float32)
    if scale > 1:
        half = real.astype(np.float16)
        lengths = (half.astype(np.float32) ** 2).sum(1)
        assert (lengths > 65_504).any()
        assert (lengths < 60_000).any()
    expected = _adm(real, fake, 3, block)
    assert 0 < expected[0] < 1
    assert precision_recall(real, fake, 3, rounding="adm") == expected


def test_its_rounding_is_visible() -> None:
    """Points close together but far from 0 are indistinguishable in float16."""
    real, fake = (1.5 + 0.02 * _features(seed, 200, 1.0) for seed in (0, 1))
    exact, rounded = (
        precision_recall(real, fake, 3, rounding=rounding) for rounding in ("exact", "adm")
    )
    assert rounded == _adm(real, fake, 3, 10_000)
    assert max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) > 0.01
    assert precision_recall(real, fake, 3) == exact


def test_bad_features_are_named_with_either_rounding() -> None:
    with pytest.raises(ValueError, match="too few for 3 neighbors"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)), 3, rounding="adm")
