"""The metrics of an evaluation, from the measurements of its chunks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation.chunks import FEATURES, LABELS, LOGITS, PREDICTIONS, SPATIAL
from diffit_train.evaluation.metrics import (
    FeatureStats,
    InceptionScore,
    Rounding,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from diffit_train.evaluation.references import Reference, Statistics, added
from diffit_train.metric_names import distance_name

# With too few images the covariance is singular, and the distance depends on chance.
SINGULAR = (
    "the number of {which} images, {count:,}, does not exceed the {dims:,} features, so their "
    "covariance is singular; compare this distance only with others of as many images"
)


class MetricSuite:
    """All metrics of an evaluation; add chunks in the order of their images.

    Keeps only the float32 features that precision, recall and KID need; everything else is sums.

    Args:
        rounding: arithmetic of precision and recall.
    """

    def __init__(self, recipe: Recipe, reference: Reference, rounding: Rounding = "exact") -> None:
        self.recipe, self.reference, self.rounding = recipe, reference, rounding
        self.features: list[np.ndarray] = []
        self.moments: FeatureStats | None = None
        self.spatial: FeatureStats | None = None
        self.score = InceptionScore()
        self.agreeing = self.count = 0

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Add a chunk.

        Raises:
            DiffitError: features are not finite.
        """
        for name in (FEATURES, SPATIAL, LOGITS):
            if name in rows and not np.isfinite(rows[name]).all():
                raise DiffitError(
                    f"the {name} of images {self.count} to "
                    f"{self.count + len(rows[name]) - 1} are not finite"
                )
        self.count += len(rows[FEATURES])
        self.features.append(rows[FEATURES])
        self.moments = added(self.moments, rows[FEATURES])
        if SPATIAL in rows:
            self.spatial = added(self.spatial, rows[SPATIAL])
        if LOGITS in rows:
            self.score.add(rows[LOGITS])
        if PREDICTIONS in rows:
            self.agreeing += int((rows[LABELS] == rows[PREDICTIONS]).sum())

    def warnings(self) -> Iterator[str]:
        """What a reader of the metrics should know."""
        dims = self.features[0].shape[1]
        for which, count in (("generated", self.count), ("real", self.reference.count)):
            if count is not None and count <= dims:
                yield SINGULAR.format(count=count, which=which, dims=dims)

    def values(self) -> dict[str, float]:
        """The metrics by name.

        Raises:
            DiffitError: they cannot be computed.
        """
        try:
            return dict(self._values())
        except ValueError as error:
            raise DiffitError(f"cannot compute the metrics: {error}") from error

    def _values(self) -> Iterator[tuple[str, float]]:
        assert self.moments is not None
        evaluate, reference = self.recipe.evaluate, self.reference
        own, published = evaluate.features.name, evaluate.features.published
        yield distance_name("fd", own, published), _distance(self.moments, reference.pool)
        if self.spatial is not None and reference.spatial is not None:
            yield distance_name("sfd", own, published), _distance(self.spatial, reference.spatial)
        features = np.concatenate(self.features)
        if reference.features is not None:
            precision, recall = precision_recall(
                reference.features, features, evaluate.num_neighbors, self.rounding
            )
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
