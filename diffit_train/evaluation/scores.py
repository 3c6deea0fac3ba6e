"""The metrics of an evaluation: sums over its chunks while images are still being generated.

Images are summed in groups of fixed size, and groups are added in order: the metrics are the same,
bit for bit, whatever the chunks and the order in which actors finish them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation import chunks
from diffit_train.evaluation.chunks import (
    FEATURES,
    LABELS,
    LOGITS,
    PREDICTIONS,
    SPATIAL,
    Range,
)
from diffit_train.evaluation.generate import choose_labels
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

# Images summed at once: one product of 2,048 rows costs a fraction of 32 products of 64 rows.
GROUP = 2048
# With too few images the covariance is singular, and the distance depends on chance.
SINGULAR = (
    "the number of {which} images, {count:,}, does not exceed the {dims:,} features, so their "
    "covariance is singular; compare this distance only with others of as many images"
)


@dataclass
class Sums:
    """Float64 sums over successive images, and their float32 features.

    The features are kept because precision, recall and the kernel distance need them.
    """

    count: int = 0
    features: list[np.ndarray] = field(default_factory=list)
    moments: FeatureStats | None = None
    spatial: FeatureStats | None = None
    score: InceptionScore = field(default_factory=InceptionScore)
    agreeing: int = 0

    @classmethod
    def of(cls, rows: dict[str, np.ndarray], first: int = 0) -> Self:
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
                last = first + count - 1
                raise DiffitError(f"the {name} of images {first} to {last} are not finite")
        score = InceptionScore(first=first)
        if LOGITS in rows:
            score.add(rows[LOGITS])
        return cls(
            count=count,
            features=[rows[FEATURES]],
            moments=FeatureStats.of(rows[FEATURES]),
            spatial=FeatureStats.of(rows[SPATIAL]) if SPATIAL in rows else None,
            score=score,
            agreeing=int((rows[LABELS] == rows[PREDICTIONS]).sum()) if PREDICTIONS in rows else 0,
        )

    def add(self, more: Sums) -> None:
        """Add the sums over the next images."""
        self.count += more.count
        self.features += more.features
        self.moments = _added(self.moments, more.moments)
        self.spatial = _added(self.spatial, more.spatial)
        self.score += more.score
        self.agreeing += more.agreeing


def _added(one: FeatureStats | None, other: FeatureStats | None) -> FeatureStats | None:
    return one + other if one is not None and other is not None else one or other


def warnings(sums: Sums, reference: Reference) -> Iterator[str]:
    """What a reader of the metrics against a reference should know."""
    dims = sums.features[0].shape[1]
    for which, count in (("generated", sums.count), ("real", reference.count)):
        if count is not None and count <= dims:
            yield SINGULAR.format(count=count, which=which, dims=dims)


def metrics(recipe: Recipe, sums: Sums, reference: Reference) -> dict[str, float]:
    """The metrics by name, against a reference.

    Raises:
        DiffitError: they cannot be computed.
    """
    try:
        return dict(_metrics(recipe, sums, reference))
    except ValueError as error:
        raise DiffitError(f"cannot compute the metrics: {error}") from error


def _metrics(recipe: Recipe, sums: Sums, reference: Reference) -> Iterator[tuple[str, float]]:
    assert sums.moments is not None
    network = recipe.evaluate.features
    name, published = network.name, network.published
    yield distance_name("fd", name, published), _distance(sums.moments, reference.pool)
    if sums.spatial is not None and reference.spatial is not None:
        yield distance_name("sfd", name, published), _distance(sums.spatial, reference.spatial)
    features = np.concatenate(sums.features)
    if reference.features is not None:
        precision, recall = precision_recall(reference.features, features, NEIGHBORS)
        yield "precision", precision
        yield "recall", recall
        kernel, _ = kernel_distance(reference.features, features)
        yield distance_name("kd", name, published), kernel
    if published:
        yield "inception_score", sums.score.value()[0]
    if network.kind == "classifier" and recipe.model.conditional:
        yield "classifier_accuracy", sums.agreeing / sums.count


def _distance(fake: FeatureStats, real: Statistics) -> float:
    return frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)


class Scorer:
    """Takes the chunks of an evaluation in any order, and sums them in the order of the images.

    Args:
        url: folder of the evaluation.
        key: key of the evaluation.
        executor: reads and sums whole groups in the background.
    """

    def __init__(self, recipe: Recipe, url: str, key: str, executor: Executor) -> None:
        self.url, self.key, self.executor = url, key, executor
        self.sums = Sums()
        samples = recipe.evaluate.samples
        self.groups = [
            Range(first, min(first + GROUP, samples)) for first in range(0, samples, GROUP)
        ]
        self._left = [group.size for group in self.groups]
        self._chunks: list[list[Range]] = [[] for _ in self.groups]
        self._group_sums: dict[int, Future[Sums]] = {}
        self._merged = 0

    def add(self, parts: Iterable[Range]) -> None:
        """Take in committed chunks."""
        for part in parts:
            for number in range(part.first // GROUP, (part.stop - 1) // GROUP + 1):
                self._chunks[number].append(part)
                self._left[number] -= _overlap(part, self.groups[number]).size
                if not self._left[number]:
                    self._group_sums[number] = self.executor.submit(
                        group_sums,
                        self.url,
                        self.key,
                        sorted(self._chunks[number]),
                        self.groups[number],
                    )
        # Early, as the sums of 2,048 features are 32 MB.
        while self._merged in self._group_sums and self._group_sums[self._merged].done():
            self._merge_next()

    @property
    def taken(self) -> int:
        """Number of images taken in."""
        return sum(group.size for group in self.groups) - sum(self._left)

    @property
    def complete(self) -> bool:
        """Whether all images have been taken in."""
        return not any(self._left)

    def finish(self) -> Sums:
        """Hand over the sums of all images; waits for those in the background.

        Raises:
            DiffitError: a chunk is damaged, or its features are not finite.
        """
        while self._merged < len(self.groups):
            self._merge_next()
        sums, self.sums = self.sums, Sums()  # its features are large
        return sums

    def _merge_next(self) -> None:
        self.sums.add(self._group_sums.pop(self._merged).result())
        self._merged += 1


def group_sums(url: str, key: str, parts: Sequence[Range], group: Range) -> Sums:
    """The sums over a group of images, read from the chunks that hold them, in order.

    Raises:
        DiffitError: a chunk is damaged, or its features are not finite.
    """
    found: dict[str, list[np.ndarray]] = {}
    for part in parts:
        shared = _overlap(part, group)
        inside = slice(shared.first - part.first, shared.stop - part.first)
        for name, values in chunks.read_chunk(url, part, key).items():
            found.setdefault(name, []).append(values[inside])
    rows = {name: np.concatenate(values) for name, values in found.items()}
    return Sums.of(rows, group.first)


def _overlap(part: Range, group: Range) -> Range:
    return Range(max(part.first, group.first), min(part.stop, group.stop))


# ---- The grid ----


def grid_rows(recipe: Recipe, part: Range) -> list[int]:
    """Rows of a chunk whose images are in the grid."""
    wanted = sorted(index for row in grid_images(recipe).values() for index in row)
    return [index - part.first for index in wanted if part.first <= index < part.stop]


def grid_images(recipe: Recipe) -> dict[int, list[int]]:
    """The grid's labels, and the indices of the images of each.

    They are the labels that occur, as few random labels skip classes, in ascending order.
    """
    evaluate = recipe.evaluate
    return _grid_images(
        evaluate.labels,
        evaluate.seed,
        evaluate.samples,
        recipe.data.num_classes,
        *evaluate.grid,
    )


@functools.lru_cache(maxsize=8)
def _grid_images(
    how: str, seed: int, samples: int, classes: int, rows: int, columns: int
) -> dict[int, list[int]]:
    labels = choose_labels(how, seed, range(samples), classes)  # type: ignore[arg-type]
    shown = np.unique(labels)[:rows].tolist()
    return {label: np.flatnonzero(labels == label)[:columns].tolist() for label in shown}


def read_grid(recipe: Recipe, url: str) -> dict[int, list[np.ndarray]]:
    """The grid's images, (R, R, 3) uint8, by label.

    Args:
        url: folder of the evaluation.

    Raises:
        DiffitError: images are damaged.
    """
    label_of = {index: label for label, row in grid_images(recipe).items() for index in row}
    shown: dict[int, list[np.ndarray]] = {label: [] for label in grid_images(recipe)}
    for part in chunks.committed_chunks(url):
        rows = grid_rows(recipe, part)
        if rows:
            for row, image in zip(rows, chunks.read_grid_images(url, part, rows), strict=True):
                shown[label_of[part.first + row]].append(image)
    return shown
