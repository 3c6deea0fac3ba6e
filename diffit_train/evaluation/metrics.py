"""Distances between sets of images, on features of shape (n, D); sums in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from diffit_train.evaluation.half_precision import precision_recall_half

Array = np.ndarray
Rounding = Literal["exact", "adm"]
# Rows of features that are held in float64, or whose distances are held, at once.
_BLOCK_ROWS = 2048
# An eigenvalue that is negative by more than this share of the largest is no rounding; statistics
# that were stored in float32 come near 1e-7.
_NEGATIVE = 1e-6
# Relative to the product of the covariances' norms.
_TRACE_ERROR = 1e-8
# Float32 distances are trusted up to this share of the squared lengths; errors seen are 8e-7.
_SCREEN = 1e-5
# Neighbours that are measured again in float64 beyond those asked for.
_SPARE = 4


# ---- Frechet distance ----


@dataclass(frozen=True)
class FeatureStats:
    """Sums from which mean and covariance follow; those of two sets can be added.

    The covariance has a relative error of about 1e-15 * (1 + (mean / deviation)^2): below 1e-9 up
    to a mean of 300 deviations; Inception's features have about one.
    """

    count: int
    total: Array  # (D,)
    outer: Array  # (D, D)

    @classmethod
    def of(cls, features: Array) -> Self:
        """The sums over the rows of (n, D); n may be 0.

        Raises:
            ValueError: another shape, or a number that is not finite.
        """
        if features.ndim != 2:
            raise ValueError(f"features have the shape {features.shape}, not (images, features)")
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
        """(D,); ValueError without any image."""
        self._require(1)
        return self.total / self.count

    @property
    def covariance(self) -> Array:
        """(D, D), with n - 1 in the denominator; ValueError below two images."""
        self._require(2)
        centred = self.outer - np.outer(self.total, self.total) / self.count
        return centred / (self.count - 1)

    def _require(self, count: int) -> None:
        if self.count < count:
            raise ValueError(f"{self.count} images are too few for a mean and a covariance")


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Squared Frechet distance of two normal distributions (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With C1 = F F^T, the product C1 C2 has the
    eigenvalues of F^T C2 F, which is symmetric, so nothing complex can arise.

    Args:
        mean1: (D,), as mean2. cov1: (D, D), as cov2; symmetric, singular ones included.

    Raises:
        ValueError: shapes differ, a number is not finite, a covariance has a negative eigenvalue
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
    # The narrower one leaves out directions in which the product is 0: the root of their rounding
    # errors would count.
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
    """F (D, rank) with F F^T = C: by Cholesky with pivots, which finds the rank of singular ones.

    An eigendecomposition, six times slower, is left for what is not positive within rounding.
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
        raise ValueError(f"{name}: some numbers are not finite")


# ---- Inception score ----


class InceptionScore:
    """Inception score (Salimans et al. 2016) over splits in image order, as ADM computes it.

    exp(mean over x of KL(p(y|x) || p(y))) of each split, the last of which may be short. Of a split
    only sums are kept: of p, and of p log p. Scores of parts add up, in any order.

    Args:
        split: images in a split.
        first: number of the first image that is added.
    """

    def __init__(self, split: int = 5000, first: int = 0) -> None:
        self.split, self.next = split, first
        self._counts: dict[int, int] = {}
        # Split to [sum of p (K,), sum of p log p (1,)].
        self._sums: dict[int, Array] = {}

    def add(self, logits: Array) -> None:
        """Take in the logits (n, K) of the images that follow.

        Raises:
            ValueError: another shape, or a number that is not finite.
        """
        if logits.ndim != 2:
            raise ValueError(f"logits have the shape {logits.shape}, not (images, classes)")
        _require_finite("logits", logits)
        start = 0
        while start < len(logits):
            number, place = divmod(self.next, self.split)
            part = logits[start : start + min(self.split - place, _BLOCK_ROWS)]
            self._take(number, len(part), _sums_of_split(part))
            self.next += len(part)
            start += len(part)

    def __add__(self, other: InceptionScore) -> InceptionScore:
        if self.split != other.split:
            raise ValueError(f"splits of {self.split} and of {other.split} images do not add up")
        result = InceptionScore(self.split, max(self.next, other.next))
        for part in (self, other):
            for number, count in part._counts.items():
                result._take(number, count, part._sums[number])
        return result

    def _take(self, number: int, count: int, sums: Array) -> None:
        if number in self._sums and len(self._sums[number]) != len(sums):
            raise ValueError(
                f"logits of {len(sums) - 1} classes follow those of {len(self._sums[number]) - 1}"
            )
        self._counts[number] = self._counts.get(number, 0) + count
        self._sums[number] = self._sums[number] + sums if number in self._sums else sums

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits.

        Raises:
            ValueError: there are no images, or some are missing or counted twice.
        """
        if not self.next or not self._counts:
            raise ValueError("no images were added for the inception score")
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
            seen = marginal[marginal > 0]
            scores.append(np.exp(negative_entropy - seen @ np.log(seen)))
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
    """Kernel inception distance (Binkowski et al. 2018, section 4): mean and deviation.

    The unbiased squared MMD with the kernel (x . y / D + 1)^3, over subsets drawn without
    replacement. Where there are fewer rows than `size`, the subsets have that many.

    Args:
        real: (n, D). fake: (m, D).

    Raises:
        ValueError: fewer than two rows, other shapes, or a number that is not finite.
    """
    _require_sets(real, fake, 2, "a kernel distance")
    size = min(size, len(real), len(fake))
    random = np.random.Generator(np.random.Philox(seed))
    values = []
    for _ in range(subsets):
        chosen = [rows[random.choice(len(rows), size, replace=False)] for rows in (real, fake)]
        both = np.concatenate(chosen).astype(np.float64)
        kernel = (both @ both.T / both.shape[1] + 1.0) ** 3
        inside = [
            part.sum() - np.trace(part) for part in (kernel[:size, :size], kernel[size:, size:])
        ]
        values.append(sum(inside) / (size * (size - 1)) - 2.0 * kernel[:size, size:].mean())
    return float(np.mean(values)), float(np.std(values))


def _require_sets(real: Array, fake: Array, least: int, need: str) -> None:
    for name, rows in (("real", real), ("fake", fake)):
        if rows.ndim != 2 or rows.shape[1] != fake.shape[-1]:
            raise ValueError(f"real and fake features differ: {real.shape} and {fake.shape}")
        if len(rows) < least:
            raise ValueError(f"{len(rows)} {name} images are too few for {need}")
        _require_finite(f"{name} features", rows)


# ---- Precision and recall ----


def precision_recall(
    real: Array, fake: Array, num_neighbors: int, rounding: Rounding = "exact"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision is the share of fakes inside the real images' manifold, recall the reverse; a
    manifold is the union of closed balls around each point that reach its k-th nearest neighbor.

    Distances are screened in float32; what that leaves open is decided in float64. Memory grows
    with n + m, beside one block of distances.

    Args:
        real: (n, D). fake: (m, D). num_neighbors: k; below n and m.
        rounding: exact, or adm for that of ADM's evaluator, which computes distances in float16
            and by which published metrics were made; see `half_precision`.

    Raises:
        ValueError: too few rows, other shapes, or a number that is not finite.
    """
    _require_sets(real, fake, num_neighbors + 1, f"{num_neighbors} neighbors")
    if rounding == "adm":
        return precision_recall_half(real, fake, num_neighbors)
    centre = real.mean(0, dtype=np.float64)
    scale = max(float(np.abs(rows - centre).max()) for rows in _blocks(real, fake))
    points = [_Points(rows, centre, scale or 1.0) for rows in (real, fake)]
    return _shares_inside(points[0], points[1], *(_radii(part, num_neighbors) for part in points))


def _blocks(*parts: Array) -> Iterator[Array]:
    for part in parts:
        for start in range(0, len(part), _BLOCK_ROWS):
            yield part[start : start + _BLOCK_ROWS]


class _Points:
    """Rows (n, D) as given, and shifted and scaled into float32's best range."""

    def __init__(self, rows: Array, centre: Array, scale: float) -> None:
        self.given, self.centre, self.scale = rows, centre, scale
        self.near = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            self.near[part] = self.exact(part)
        self.squares = np.einsum("nd,nd->n", self.near, self.near)
        self.parts = [slice(i, i + _BLOCK_ROWS) for i in range(0, len(rows), _BLOCK_ROWS)]

    def exact(self, index: slice | Array) -> Array:
        """Some rows, shifted and scaled, float64."""
        return (self.given[index] - self.centre) / self.scale

    def screened(self, part: slice, other: _Points, part_of_other: slice) -> Array:
        """Squared distances, float32, about right."""
        distances = (-2.0 * self.near[part]) @ other.near[part_of_other].T
        distances += self.squares[part, None]
        distances += other.squares[part_of_other]
        return distances

    def distances(self, chosen: Array, others: _Points) -> Iterator[tuple[slice, Array, Array]]:
        """Part by part of the others: squared distances, float64, and the squared lengths' sums."""
        rows = self.exact(chosen)
        squares = (rows**2).sum(1)[:, None]
        for part in others.parts:
            columns = others.exact(part)
            lengths = squares + (columns**2).sum(1)
            yield part, lengths, lengths - 2.0 * rows @ columns.T


def _radii(points: _Points, num_neighbors: int) -> Array:
    """Squared distance of each point to its k-th nearest neighbor besides itself, float64 (n,)."""
    count = len(points.given)
    nearest = _Nearest(count, min(num_neighbors + 1 + _SPARE, count))
    pairs = [(a, b) for i, a in enumerate(points.parts) for b in points.parts[i:]]
    # Those on the diagonal first: the sooner the bounds are tight, the less has to be sorted in.
    for a, b in sorted(pairs, key=lambda pair: pair[0] != pair[1]):
        distances = points.screened(a, points, b)
        nearest.take(a.start, b.start, distances)
        if a != b:
            nearest.take(b.start, a.start, distances.T)
    radii = np.empty(count)
    _measure(points, num_neighbors, np.arange(count), nearest.numbers, radii)
    # Where one that was left out may be as near, all are compared again in float64.
    bound = radii + _SCREEN * (points.squares + points.squares.max())
    (doubtful,) = np.nonzero((nearest.values.max(1) <= bound) & (radii > 0))
    if nearest.values.shape[1] < count:
        for start in range(0, len(doubtful), _BLOCK_ROWS):
            chosen = doubtful[start : start + _BLOCK_ROWS]
            better = _Nearest(len(chosen), nearest.values.shape[1], np.float64)
            for part, _, distances in points.distances(chosen, points):
                better.take(0, part.start, distances)
            _measure(points, num_neighbors, chosen, better.numbers, radii)
    return radii


def _measure(
    points: _Points, num_neighbors: int, rows: Array, candidates: Array, radii: Array
) -> None:
    """Set the radii of some rows (r,) by differences to their candidates (r, c), in float64."""
    rows_at_once = 64
    for start in range(0, len(rows), rows_at_once):
        chosen, others = (v[start : start + rows_at_once] for v in (rows, candidates))
        difference = points.exact(others.ravel()).reshape(*others.shape, -1)
        difference -= points.exact(chosen)[:, None]
        squares = np.einsum("nkd,nkd->nk", difference, difference)
        # A point is its own nearest neighbor, at distance 0.
        radii[chosen] = np.partition(squares, num_neighbors, axis=1)[:, num_neighbors]


class _Nearest:
    """For each of `count` rows the smallest values seen so far, and the columns they were in."""

    def __init__(self, count: int, width: int, dtype: type = np.float32) -> None:
        self.values: Array = np.full((count, width), np.inf, dtype)
        self.numbers = np.zeros((count, width), np.int64)

    def take(self, first_row: int, first_column: int, block: Array) -> None:
        """Take in the values of a block of rows and columns."""
        rows = slice(first_row, first_row + len(block))
        values, numbers = self.values[rows], self.numbers[rows]
        bound = values.max(1)
        if block.flags.c_contiguous:
            found, column = np.divmod(np.flatnonzero(block < bound[:, None]), block.shape[1])
        else:
            # Read in the order of memory, then sorted by row: few are left.
            column, found = np.divmod(np.flatnonzero(bound > block.T), len(block))
            order = np.argsort(found, kind="stable")
            found, column = found[order], column[order]
        if not len(found):
            return
        changed, first, hits = np.unique(found, return_index=True, return_counts=True)
        width = values.shape[1]
        # Side by side: what is known of a changed row, then its hits, then nothing.
        wide = np.full((len(changed), width + hits.max()), np.inf, values.dtype)
        names = np.zeros(wide.shape, np.int64)
        wide[:, :width], names[:, :width] = values[changed], numbers[changed]
        place = np.repeat(np.arange(len(changed)), hits)
        offset = width + np.arange(len(found)) - np.repeat(first, hits)
        wide[place, offset], names[place, offset] = block[found, column], first_column + column
        best = np.argpartition(wide, width - 1, axis=1)[:, :width]
        values[changed] = np.take_along_axis(wide, best, 1)
        numbers[changed] = np.take_along_axis(names, best, 1)


def _shares_inside(
    real: _Points, fake: _Points, real_radii: Array, fake_radii: Array
) -> tuple[float, float]:
    """Share of fakes in some ball around a real point, and the reverse."""
    # How far each point is inside (negative) or outside of the ball that suits it best.
    of_real = np.full(len(real.given), np.inf)
    of_fake = np.full(len(fake.given), np.inf)
    for a in real.parts:
        for b in fake.parts:
            distances = real.screened(a, fake, b)
            of_real[a] = np.minimum(of_real[a], (distances - fake_radii[b].astype("f4")).min(1))
            distances -= real_radii[a, None].astype("f4")
            of_fake[b] = np.minimum(of_fake[b], distances.min(0))
    precision = _decide(of_fake, fake, real, real_radii)
    return precision, _decide(of_real, real, fake, fake_radii)


def _decide(margins: Array, points: _Points, manifold: _Points, radii: Array) -> float:
    """Share of the points inside; where the float32 margins are too small, found in float64."""
    tolerance = _SCREEN * (points.squares + manifold.squares.max())
    inside = margins < -tolerance
    (close,) = np.nonzero(np.abs(margins) <= tolerance)
    for start in range(0, len(close), _BLOCK_ROWS):
        chosen = close[start : start + _BLOCK_ROWS]
        for part, lengths, distances in points.distances(chosen, manifold):
            # Closed balls: what lies on the rim within float64's rounding is inside.
            inside[chosen] |= (distances - radii[part] <= 1e-13 * lengths).any(1)
    return float(inside.mean())
