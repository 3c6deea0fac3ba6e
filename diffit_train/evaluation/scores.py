"""The metrics of an evaluation, from the measurements of its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation.chunks import FEATURES, LABELS, LOGITS, PREDICTIONS, SPATIAL
from diffit_train.evaluation.metrics import (
    NEIGHBORS,
    FeatureStats,
    InceptionScore,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffit_train.evaluation.references import Reference, Statistics
from diffit_train.tracking import distance_name

# With too few images the covariance is singular, and the distance depends on chance.
SINGULAR = (
    "the number of {which} images, {count:,}, does not exceed the {dims:,} features, so their "
    "covariance is singular; compare this distance only with others of as many images"
)


@dataclass(frozen=True)
class PartSums:
    """Float64 sums over successive images, and their float32 features."""

    count: int
    features: np.ndarray
    moments: FeatureStats
    spatial: FeatureStats | None
    score: InceptionScore | None
    agreeing: int


def part_sums(rows: dict[str, np.ndarray], first: int) -> PartSums:
    """The sums over measured images.

    Args:
        rows: arrays with one row per image.
        first: index of the first image.

    Raises:
        DiffitError: features are not finite.
    """
    count = len(rows[FEATURES])
    for name in (FEATURES, SPATIAL, LOGITS):
        if name in rows and not np.isfinite(rows[name]).all():
            raise DiffitError(f"the {name} of images {first} to {first + count - 1} are not finite")
    score = None
    if LOGITS in rows:
        score = InceptionScore(first=first)
        score.add(rows[LOGITS])
    return PartSums(
        count=count,
        features=rows[FEATURES],
        moments=FeatureStats.of(rows[FEATURES]),
        spatial=FeatureStats.of(rows[SPATIAL]) if SPATIAL in rows else None,
        score=score,
        agreeing=int((rows[LABELS] == rows[PREDICTIONS]).sum()) if PREDICTIONS in rows else 0,
    )


class MetricSuite:
    """All metrics of an evaluation; add parts in the order of their images.

    Keeps only the float32 features that precision, recall and KID need; everything else is sums.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.features: list[np.ndarray] = []
        self.moments: FeatureStats | None = None
        self.spatial: FeatureStats | None = None
        self.score = InceptionScore()
        self.agreeing = self.count = 0

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Add measured images.

        Raises:
            DiffitError: features are not finite.
        """
        self.merge(part_sums(rows, self.count))

    def merge(self, part: PartSums) -> None:
        """Add the sums over the next images."""
        self.count += part.count
        self.features.append(part.features)
        self.moments = part.moments if self.moments is None else self.moments + part.moments
        if part.spatial is not None:
            self.spatial = part.spatial if self.spatial is None else self.spatial + part.spatial
        if part.score is not None:
            self.score += part.score
        self.agreeing += part.agreeing

    def warnings(self, reference: Reference) -> Iterator[str]:
        """What a reader of the metrics against a reference should know."""
        dims = self.features[0].shape[1]
        for which, count in (("generated", self.count), ("real", reference.count)):
            if count is not None and count <= dims:
                yield SINGULAR.format(count=count, which=which, dims=dims)

    def values(self, reference: Reference) -> dict[str, float]:
        """The metrics by name, against a reference.

        Raises:
            DiffitError: they cannot be computed.
        """
        try:
            return dict(self._values(reference))
        except ValueError as error:
            raise DiffitError(f"cannot compute the metrics: {error}") from error

    def _values(self, reference: Reference) -> Iterator[tuple[str, float]]:
        assert self.moments is not None
        evaluate = self.recipe.evaluate
        own, published = evaluate.features.name, evaluate.features.published
        yield distance_name("fd", own, published), _distance(self.moments, reference.pool)
        if self.spatial is not None and reference.spatial is not None:
            yield distance_name("sfd", own, published), _distance(self.spatial, reference.spatial)
        features = np.concatenate(self.features)
        if reference.features is not None:
            precision, recall = precision_recall(reference.features, features, NEIGHBORS)
            yield "precision", precision
            yield "recall", recall
            kernel, _ = kernel_distance(reference.features, features)
            yield distance_name("kd", own, published), kernel
        if published:
            yield "inception_score", self.score.value()[0]
        if evaluate.features.kind == "classifier" and self.recipe.model.conditional:
            yield "classifier_accuracy", self.agreeing / self.count


def _distance(fake: FeatureStats, real: Statistics) -> float:
    return frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
