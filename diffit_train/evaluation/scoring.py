"""Sums the measurements of an evaluation while its images are still being generated."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future

import numpy as np

from diffit_train.config import Recipe
from diffit_train.evaluation import chunks
from diffit_train.evaluation.chunks import Range
from diffit_train.evaluation.labels import choose_labels
from diffit_train.evaluation.scores import MetricSuite, PartSums, part_sums

# Images summed at once: one product of 2,048 rows costs a fraction of 32 products of 64 rows.
GROUP = 2048


class Scorer:
    """Takes the chunks of an evaluation in any order, and sums them in the order of the images.

    Images are summed in groups of fixed size, and groups are added in order: the metrics are the
    same, bit for bit, whatever the chunks and the order in which actors finish them.

    Args:
        url: folder of the evaluation.
        key: key of the evaluation.
        executor: reads and sums whole groups in the background.
    """

    def __init__(self, recipe: Recipe, url: str, key: str, executor: Executor) -> None:
        self.url, self.key, self.executor = url, key, executor
        self.suite = MetricSuite(recipe)
        samples = recipe.evaluate.samples
        self.groups = [
            Range(first, min(first + GROUP, samples)) for first in range(0, samples, GROUP)
        ]
        self._left = [group.size for group in self.groups]
        self._chunks: list[list[Range]] = [[] for _ in self.groups]
        self._sums: dict[int, Future[PartSums]] = {}
        self._merged = 0

    def add(self, parts: Iterable[Range]) -> None:
        """Take in committed chunks."""
        for part in parts:
            for number in range(part.first // GROUP, (part.stop - 1) // GROUP + 1):
                self._chunks[number].append(part)
                self._left[number] -= _overlap(part, self.groups[number]).size
                if not self._left[number]:
                    self._sums[number] = self.executor.submit(
                        group_sums,
                        self.url,
                        self.key,
                        sorted(self._chunks[number]),
                        self.groups[number],
                    )
        # Early, as the sums of 2,048 features are 32 MB.
        while self._merged in self._sums and self._sums[self._merged].done():
            self._merge_next()

    @property
    def taken(self) -> int:
        """Number of images taken in."""
        return sum(group.size for group in self.groups) - sum(self._left)

    @property
    def complete(self) -> bool:
        """Whether all images have been taken in."""
        return not any(self._left)

    def finish(self) -> MetricSuite:
        """Hand over the sums of all images; waits for those in the background.

        Raises:
            DiffitError: a chunk is damaged, or its features are not finite.
        """
        while self._merged < len(self.groups):
            self._merge_next()
        suite = self.suite
        del self.suite  # its features are large
        return suite

    def _merge_next(self) -> None:
        self.suite.merge(self._sums.pop(self._merged).result())
        self._merged += 1


def group_sums(url: str, key: str, parts: Sequence[Range], group: Range) -> PartSums:
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
    return part_sums(rows, group.first)


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
