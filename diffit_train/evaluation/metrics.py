"""Metrics of sets of images, on features of shape (n, D); sums in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

Array = np.ndarray
# k of precision and recall, as ADM's.
NEIGHBORS = 3
# Rows of features converted to float64, or compared in one block of distances, at a time.
_BLOCK_ROWS = 2048
# A negative eigenvalue above this fraction of the largest is not rounding; statistics stored in
# float32 reach about 1e-7.
_NEGATIVE = 1e-6
# Tolerated error of the trace, relative to the product of the covariances' norms.
_TRACE_ERROR = 1e-8
# Of squared distances in float64, relative to the lengths of the points.
_ROUNDING = 1e-13


# ---- Frechet distance ----


@dataclass(frozen=True)
class FeatureStats:
    """Sums that give mean and covariance; the sums of two sets can be added.

    The covariance has a relative error of about 1e-15 * (1 + (mean / deviation)^2): below 1e-9 for
    means up to 300 standard deviations; Inception's features have about one.
    """

    count: int
    total: Array  # (D,)
    outer: Array  # (D, D)

    @classmethod
    def of(cls, features: Array) -> Self:
        """The sums over the rows of (n, D); n may be 0.

        Raises:
            ValueError: wrong shape, or a value is not finite.
        """
        if features.ndim != 2:
            raise ValueError(f"features have shape {features.shape}, not (images, features)")
        count, width = features.shape
        total, outer = np.zeros(width), np.zeros((width, width))
        for start in range(0, count, _BLOCK_ROWS):
            rows = features[start : start + _BLOCK_ROWS].astype(np.float64)
            _require_finite("features", rows)
            total += rows.sum(0)
            outer += rows.T @ rows
        return cls(count, total, outer)

    def __add__(self, other: FeatureStats) -> FeatureStats:
        return FeatureStats(
            self.count + other.count, self.total + other.total, self.outer + other.outer
        )

    @property
    def mean(self) -> Array:
        """(D,); ValueError if there are no images."""
        self._require(1)
        return self.total / self.count

    @property
    def covariance(self) -> Array:
        """(D, D), with n - 1 in the denominator; ValueError for fewer than two images."""
        self._require(2)
        centered = self.outer - np.outer(self.total, self.total) / self.count
        return centered / (self.count - 1)

    def _require(self, count: int) -> None:
        if self.count < count:
            raise ValueError(f"{self.count} images are too few for a mean and a covariance")


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Squared Frechet distance of two normal distributions (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With C1 = F F^T, the product C1 C2 has the
    eigenvalues of F^T C2 F, which is symmetric, so they are real.

    Args:
        mean1, mean2: (D,).
        cov1, cov2: (D, D), symmetric, may be singular.

    Raises:
        ValueError: shapes differ, a value is not finite, a covariance has a negative eigenvalue
            beyond rounding, or the eigenvalues do not add up to tr(C1 C2).
    """
    mean1, cov1, mean2, cov2 = (np.asarray(v, np.float64) for v in (mean1, cov1, mean2, cov2))
    width = len(mean1)
    if mean2.shape != (width,) or not cov1.shape == cov2.shape == (width, width):
        shapes = [value.shape for value in (mean1, cov1, mean2, cov2)]
        raise ValueError(f"means and covariances differ in shape: {shapes}")
    for name, value in (("mean", mean1), ("mean", mean2), ("cov", cov1), ("cov", cov2)):
        _require_finite("a mean" if name == "mean" else "a covariance", value)
    difference = mean1 - mean2
    traces = np.trace(cov1) + np.trace(cov2)
    distance = difference @ difference + traces - 2.0 * _trace_of_root(cov1, cov2)
    return max(float(distance), 0.0)


def _trace_of_root(cov1: Array, cov2: Array) -> float:
    """tr((C1 C2)^(1/2))."""
    factor1, factor2 = _factor(cov1), _factor(cov2)
    # The narrower factor omits directions where the product is 0: the square roots of their
    # rounding errors would add up.
    if factor1.shape[1] <= factor2.shape[1]:
        inner = factor1.T @ cov2 @ factor1
    else:
        inner = factor2.T @ cov1 @ factor2
    if not inner.size:
        return 0.0
    eigenvalues = np.linalg.eigvalsh(inner)
    found, expected = float(eigenvalues.sum()), float(np.vdot(cov1, cov2))
    if abs(found - expected) > _TRACE_ERROR * np.linalg.norm(cov1) * np.linalg.norm(cov2):
        raise ValueError(
            f"the eigenvalues of the covariances' product add up to {found:g}, but its trace is "
            f"{expected:g}"
        )
    return float(np.sqrt(_not_negative(eigenvalues)).sum())


def _factor(cov: Array) -> Array:
    """F (D, rank) with F F^T = C, by pivoted Cholesky, which finds the rank if C is singular.

    Falls back to an eigendecomposition, six times slower, if C is not positive semidefinite within
    rounding.
    """
    from scipy.linalg import lapack

    width = len(cov)
    lower, pivots, rank, _ = lapack.dpstrf(cov, lower=1)
    factor = np.empty((width, rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    if rank == width or np.abs(cov - factor @ factor.T).max() <= 1e-12 * np.trace(cov):
        return factor
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(_not_negative(values))


def _not_negative(eigenvalues: Array) -> Array:
    tolerance = _NEGATIVE * max(float(np.abs(eigenvalues).max()), np.finfo(np.float64).tiny)
    if eigenvalues.min() < -tolerance:
        raise ValueError(
            f"a covariance has a negative eigenvalue, {eigenvalues.min():g}; the largest is "
            f"{eigenvalues.max():g}"
        )
    return eigenvalues.clip(min=0.0)


def _require_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: some values are not finite")


# ---- Inception score ----


class InceptionScore:
    """Inception score (Salimans et al. 2016) over splits in image order, as ADM computes it.

    exp(mean over x of KL(p(y|x) || p(y))) of each split; the last split may be short. Only the sums
    of p and of p log p are kept per split. Partial scores can be added in any order.

    Args:
        split: images per split.
        first: index of the first image to add.
    """

    def __init__(self, split: int = 5000, first: int = 0) -> None:
        self.split, self.next = split, first
        self._counts: dict[int, int] = {}
        # Split to [sum of p (K,), sum of p log p (1,)].
        self._sums: dict[int, Array] = {}

    def add(self, logits: Array) -> None:
        """Add the logits (n, K) of the next images.

        Raises:
            ValueError: wrong shape, or a value is not finite.
        """
        if logits.ndim != 2:
            raise ValueError(f"logits have shape {logits.shape}, not (images, classes)")
        _require_finite("logits", logits)
        start = 0
        while start < len(logits):
            number, offset = divmod(self.next, self.split)
            part = logits[start : start + min(self.split - offset, _BLOCK_ROWS)]
            self._take(number, len(part), _sums_of_split(part))
            self.next += len(part)
            start += len(part)

    def __add__(self, other: InceptionScore) -> InceptionScore:
        if self.split != other.split:
            raise ValueError(f"cannot add scores with splits of {self.split} and {other.split}")
        result = InceptionScore(self.split, max(self.next, other.next))
        for part in (self, other):
            for number, count in part._counts.items():
                result._take(number, count, part._sums[number])
        return result

    def _take(self, number: int, count: int, sums: Array) -> None:
        if number in self._sums and len(self._sums[number]) != len(sums):
            raise ValueError(
                f"logits have {len(sums) - 1} classes, but earlier ones had "
                f"{len(self._sums[number]) - 1}"
            )
        self._counts[number] = self._counts.get(number, 0) + count
        self._sums[number] = self._sums[number] + sums if number in self._sums else sums

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits.

        Raises:
            ValueError: there are no images, or some are missing or counted twice.
        """
        if not self.next or not self._counts:
            raise ValueError("the inception score has no images")
        scores = []
        for number in range(-(-self.next // self.split)):
            expected = min(self.split, self.next - number * self.split)
            count = self._counts.get(number, 0)
            if count != expected:
                raise ValueError(
                    f"split {number} of the inception score has {count} images, not {expected}"
                )
            mean = self._sums[number] / count
            marginal, negative_entropy = mean[:-1], mean[-1]
            positive = marginal[marginal > 0]
            scores.append(np.exp(negative_entropy - positive @ np.log(positive)))
        return float(np.mean(scores)), float(np.std(scores))


def _sums_of_split(logits: Array) -> Array:
    """Sums over images of p, and of p log p: (K + 1,)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(logs)
    return np.append(p.sum(0), np.vdot(p, logs))


# ---- Kernel distance ----


def kernel_distance(
    real: Array, fake: Array, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018, section 4): mean and standard deviation.

    The unbiased squared MMD with kernel (x . y / D + 1)^3, over subsets drawn without replacement.
    If there are fewer rows than `size`, the subsets have that many rows.

    Args:
        real: (n, D).
        fake: (m, D).

    Raises:
        ValueError: fewer than two rows, shapes do not match, or a value is not finite.
    """
    _require_sets(real, fake, 2, "a kernel distance")
    size = min(size, len(real), len(fake))
    random = np.random.Generator(np.random.Philox(seed))
    values = []
    for _ in range(subsets):
        chosen = [rows[random.choice(len(rows), size, replace=False)] for rows in (real, fake)]
        x, y = (rows.astype(np.float64) for rows in chosen)
        inside = [part.sum() - np.trace(part) for part in (_cubic(x, x), _cubic(y, y))]
        values.append(sum(inside) / (size * (size - 1)) - 2.0 * _cubic(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def _cubic(x: Array, y: Array) -> Array:
    """The kernel of all pairs: (n, D) and (m, D) to (n, m)."""
    base = x @ y.T
    base /= x.shape[1]
    base += 1.0
    cube: Array = base * base  # `** 3` would call pow
    cube *= base
    return cube


def _require_sets(real: Array, fake: Array, least: int, need: str) -> None:
    for name, rows in (("real", real), ("fake", fake)):
        if rows.ndim != 2 or rows.shape[1] != fake.shape[-1]:
            raise ValueError(f"real and fake features differ in shape: {real.shape}, {fake.shape}")
        if len(rows) < least:
            raise ValueError(f"{len(rows)} {name} images are too few for {need}")
        _require_finite(f"{name} features", rows)


# ---- Precision and recall ----


def precision_recall(real: Array, fake: Array, num_neighbors: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision is the fraction of fakes inside the manifold of the real images, recall the reverse. A
    manifold is the union of closed balls around each point that reach its k-th nearest neighbor.
    Distances are computed in float64. Memory is O(n + m) plus one block of distances.

    Args:
        real: (n, D).
        fake: (m, D).
        num_neighbors: k, less than n and m.

    Raises:
        ValueError: too few rows, shapes do not match, or a value is not finite.
    """
    _require_sets(real, fake, num_neighbors + 1, f"{num_neighbors} neighbors")
    center = real.mean(0, dtype=np.float64)
    scale = max(float(np.abs(rows - center).max()) for part in (real, fake) for rows in _cut(part))
    points = [_Points(rows, center, scale or 1.0) for rows in (real, fake)]
    radii = [_radii(each, num_neighbors) for each in points]
    return (
        _fraction_inside(points[1], points[0], radii[0]),
        _fraction_inside(points[0], points[1], radii[1]),
    )


def _cut(rows: Array) -> list[Array]:
    return [rows[start : start + _BLOCK_ROWS] for start in range(0, len(rows), _BLOCK_ROWS)]


class _Points:
    """Rows (n, D), handed out in blocks that are centered and scaled to [-1, 1]."""

    def __init__(self, rows: Array, center: Array, scale: float) -> None:
        self.rows, self.center, self.scale = rows, center, scale

    def blocks(self) -> Iterator[Array]:
        """Successive rows, float64."""
        for part in _cut(self.rows):
            yield (part - self.center) / self.scale


def _distances(u: Array, v: Array) -> tuple[Array, Array]:
    """Squared distances of all pairs (n, m), and |u|^2 + |v|^2, which bounds their rounding."""
    lengths = (u**2).sum(1)[:, None] + (v**2).sum(1)
    return lengths - 2.0 * u @ v.T, lengths


def _radii(points: _Points, num_neighbors: int) -> Array:
    """Squared distance of each point to its k-th nearest neighbor, not itself, float64 (n,)."""
    radii = []
    for rows in points.blocks():
        # A point is its own nearest neighbor.
        nearest = np.full((len(rows), num_neighbors + 1), np.inf)
        for others in points.blocks():
            known = np.concatenate([nearest, _distances(rows, others)[0]], axis=1)
            nearest = np.partition(known, num_neighbors, axis=1)[:, : num_neighbors + 1]
        radii.append(nearest.max(1))
    return np.concatenate(radii)


def _fraction_inside(points: _Points, manifold: _Points, radii: Array) -> float:
    """Fraction of the points inside the ball of any point of a manifold."""
    inside = []
    for rows in points.blocks():
        covered = np.zeros(len(rows), bool)
        for centers, reach in zip(manifold.blocks(), _cut(radii), strict=True):
            distances, lengths = _distances(rows, centers)
            # The balls are closed: a point on the surface, within rounding, is inside.
            covered |= (distances - reach <= _ROUNDING * lengths).any(1)
        inside.append(covered)
    return float(np.concatenate(inside).mean())
