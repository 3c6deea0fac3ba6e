"""Distances between sets of pictures, on features of shape (n, D), in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

Array = np.ndarray
# Pairs of rows whose distances are held in memory at once.
_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Moments:
    """Sums from which mean and covariance follow; those of two sets can be added."""

    count: int
    total: Array  # (D,)
    outer: Array  # (D, D)

    @classmethod
    def of(cls, features: Array) -> Self:
        """The sums over the rows of (n, D)."""
        rows = np.asarray(features, dtype=np.float64)
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Array:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Array:
        """(D, D), with n - 1 in the denominator."""
        centred = self.outer - np.outer(self.total, self.total) / self.count
        return centred / (self.count - 1)


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Squared Frechet distance of two normal distributions (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is the sum of the roots of
    the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric, so nothing complex can arise.

    Raises:
        ValueError: a number that is not finite, or a covariance with a negative eigenvalue
            beyond rounding.
    """
    for name, value in (
        ("mean", mean1),
        ("mean", mean2),
        ("covariance", cov1),
        ("covariance", cov2),
    ):
        if not np.isfinite(value).all():
            raise ValueError(f"a {name} holds numbers that are not finite")
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(_not_negative(values))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ cov2 @ root)
    trace_of_root = np.sqrt(_not_negative(inner)).sum()
    difference = mean1 - mean2
    return float(difference @ difference + np.trace(cov1) + np.trace(cov2) - 2.0 * trace_of_root)


def _not_negative(eigenvalues: Array) -> Array:
    tolerance = 1e-8 * max(float(np.abs(eigenvalues).max()), np.finfo(np.float64).tiny)
    if eigenvalues.min() < -tolerance:
        raise ValueError(f"a covariance has a negative eigenvalue, {eigenvalues.min():g}")
    return eigenvalues.clip(min=0.0)


def precision_recall(real: Array, fake: Array, neighbours: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision is the share of fakes inside the real pictures' manifold, recall the reverse; a
    manifold is the union of balls around each point that reach its k-th nearest neighbour.

    Args:
        real: (n, D). fake: (m, D). neighbours: k; below n and m.
    """
    for name, rows in (("real", real), ("fake", fake)):
        if len(rows) <= neighbours:
            raise ValueError(f"{len(rows)} {name} pictures are too few for {neighbours} neighbours")
    real, fake = (np.asarray(rows, dtype=np.float64) for rows in (real, fake))
    return _covered(fake, real, neighbours), _covered(real, fake, neighbours)


def _covered(points: Array, manifold: Array, neighbours: int) -> float:
    """Share of the points that lie inside some ball of the manifold."""
    # A point is its own nearest neighbour, at distance 0.
    radii = np.concatenate(
        [
            np.partition(block, neighbours, axis=1)[:, neighbours]
            for block in _squared_distances(manifold, manifold)
        ]
    )
    inside = [(block <= radii).any(axis=1) for block in _squared_distances(points, manifold)]
    return float(np.concatenate(inside).mean())


def _squared_distances(a: Array, b: Array) -> Iterator[Array]:
    """Squared distances between the rows of a and b, block by block of rows of a."""
    squares_b = (b**2).sum(1)
    for start in range(0, len(a), _BLOCK_ROWS):
        rows = a[start : start + _BLOCK_ROWS]
        yield ((rows**2).sum(1)[:, None] + squares_b - 2.0 * rows @ b.T).clip(min=0.0)
