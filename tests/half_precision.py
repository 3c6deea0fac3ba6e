"""Precision and recall with the rounding of ADM's evaluator, to compare with published metrics.

Dhariwal & Nichol 2021, evaluations/evaluator.py: features are cast to float16, and squared norms,
products and distances are rounded to float16 after each operation; a block of distances with a
value that is not finite is computed again in float32. Radii are float32.

TensorFlow does not specify the order and precision inside a sum or matrix product; here they
accumulate in float32 and round once, as matrix products on GPUs do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

Array = np.ndarray
# Rows of ADM's blocks; a whole block falls back to float32.
BLOCK_ROWS = 10_000
# Rows of a block computed at a time.
_ROWS = 512


def precision_recall_half(real: Array, fake: Array, num_neighbors: int) -> tuple[float, float]:
    """Precision and recall as ADM's evaluator rounds them.

    Args:
        real: (n, D), float32 or rounded to it.
        fake: (m, D), likewise.
        num_neighbors: k, less than n and m.
    """
    real, fake = real.astype(np.float32), fake.astype(np.float32)
    real_radii, fake_radii = (_half_radii(points, num_neighbors) for points in (real, fake))
    real_inside, fake_inside = np.zeros(len(real), bool), np.zeros(len(fake), bool)
    for a in _half_blocks(len(real), BLOCK_ROWS):
        for b in _half_blocks(len(fake), BLOCK_ROWS):
            for rows, distances in _distances(real[a], fake[b]):
                here = slice(a.start + rows.start, a.start + rows.stop)
                real_inside[here] |= (distances <= fake_radii[b]).any(1)
                fake_inside[b] |= (distances <= real_radii[here, None]).any(0)
    return float(fake_inside.mean()), float(real_inside.mean())


def _half_radii(points: Array, num_neighbors: int) -> Array:
    """Squared distance of each point to its k-th nearest neighbor, float32 (n,).

    By rank, as in ADM: the nearest is taken to be the point itself, although rounding may move it.
    """
    nearest = np.full((len(points), num_neighbors + 1), np.inf, np.float32)
    for a in _half_blocks(len(points), BLOCK_ROWS):
        for b in _half_blocks(len(points), BLOCK_ROWS):
            for rows, distances in _distances(points[a], points[b]):
                here = slice(a.start + rows.start, a.start + rows.stop)
                known = np.concatenate([nearest[here], distances], axis=1)
                nearest[here] = np.partition(known, num_neighbors, axis=1)[:, : num_neighbors + 1]
    return nearest.max(1)


def _distances(u: Array, v: Array) -> Iterator[tuple[slice, Array]]:
    """Squared distances (rows, m) of one of ADM's blocks, float32, a few rows of u at a time."""
    near = np.empty((len(u), len(v)), np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        halves = _HalfPoints.of(u, np.float16), _HalfPoints.of(v, np.float16)
        for rows in _half_blocks(len(u), _ROWS):
            near[rows] = _squared(halves[0], rows, halves[1])
    if np.isfinite(near).all():
        for rows in _half_blocks(len(u), _ROWS):
            yield rows, near[rows].astype(np.float32)
        return
    singles = _HalfPoints.of(u, np.float32), _HalfPoints.of(v, np.float32)
    for rows in _half_blocks(len(u), _ROWS):
        yield rows, _squared(singles[0], rows, singles[1])


class _HalfPoints(NamedTuple):
    """Rows (n, D) rounded to a dtype but stored as float32, and their squared norms."""

    rows: Array
    lengths: Array

    @classmethod
    def of(cls, rows: Array, kind: type[np.floating]) -> _HalfPoints:
        rounded = rows.astype(kind)
        lengths = np.empty(len(rows), kind)
        for part in _half_blocks(len(rows), _ROWS):
            squares = rounded[part] * rounded[part]
            lengths[part] = squares.sum(1, dtype=np.float32)
        return cls(rounded.astype(np.float32), lengths)


def _squared(u: _HalfPoints, rows: slice, v: _HalfPoints) -> Array:
    """|u|^2 - 2 u v + |v|^2, at least 0, each operation rounded to the dtype of the norms."""
    kind = u.lengths.dtype
    products = (u.rows[rows] @ v.rows.T).astype(kind) * kind.type(2)
    return np.maximum(u.lengths[rows, None] - products + v.lengths, kind.type(0))


def _half_blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
